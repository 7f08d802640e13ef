"""Adapters on bitsandbytes' 4-bit and 8-bit layers, which run on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.uora.toys import PROVENANCE, VOCABULARY, export, output, randomise
from uora.artifact import loads
from uora.methods import attach, load_artifact
from uora.quantised import keep_weight_layout
from uora.serving.bank import AdapterBank
from uora.spec import METHODS, parse_adapter
from uora.svd import BaseWeights
from uora.tuner import UoraConfig

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; it quantises base models")

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))


def _four_bit(layer: nn.Linear, *, nested: bool = False) -> nn.Module:
    return bnb.nn.Linear4bit(  # type: ignore[no-any-return]
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32,
        compress_statistics=nested, quant_type="nf4",
    )  # fmt: skip


def _eight_bit(layer: nn.Linear) -> nn.Module:
    return bnb.nn.Linear8bitLt(  # type: ignore[no-any-return]
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "4-bit": _four_bit,
    "4-bit-nested": lambda layer: _four_bit(layer, nested=True),
    "8-bit": _eight_bit,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def _quantised(kind: str) -> nn.Module:
    """A small Llama with every linear layer but the head quantised; layer sides of 16, 64 and 128.

    Inputs come in whole blocks of 64, as bitsandbytes' 4-bit dequantisation on a CPU takes for granted.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            quantised = KINDS[kind](layer)
            quantised.load_state_dict(layer.state_dict())
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, quantised.to("cpu"))
    return model.eval()


def _adapted(kind: str) -> PeftModel:
    model = get_peft_model(_quantised(kind), UoraConfig(r=8, target_modules="all-linear"))
    randomise(model)
    model.base_model.uora_hits["default"].copy_(torch.arange(8) % 3)
    return model.eval()


def _weights(model: PeftModel) -> list[torch.Tensor]:
    return [layer.get_base_weight().clone() for layer in model.base_model.adapter_layers("default").values()]


@each_kind
def test_forward_is_the_dequantised_layer_with_the_update(kind: str) -> None:
    layer = next(iter(_adapted(kind).base_model.adapter_layers("default").values()))
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    dense = layer.get_base_weight().float() + layer.get_delta_weight("default")
    with torch.no_grad():
        found = layer(x)
    # 8-bit layers quantise their inputs as well.
    torch.testing.assert_close(found, x @ dense.T, atol=2e-2 if kind == "8-bit" else 1e-5, rtol=1e-5)


@each_kind
def test_training_goes_on_after_an_evaluation(kind: str) -> None:
    model = _adapted(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        output(model.eval(), IDS)
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each_kind
def test_merge_and_exact_unmerge(kind: str) -> None:
    model = _adapted(kind)
    expected, weights = output(model, IDS), _weights(model)
    layers = model.base_model.adapter_layers("default").values()
    updates = [layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter(safe_merge=True)
    for merged, weight, update in zip(_weights(model), weights, updates, strict=True):
        # What is left is the rounding to a grid of 16 or 256 values.
        error = (merged - (weight + update)).abs().max() / (weight + update).abs().max()
        assert error < (0.005 if kind == "8-bit" else 0.17)
    model.unmerge_adapter()
    assert all(torch.equal(found, weight) for found, weight in zip(_weights(model), weights, strict=True))
    torch.testing.assert_close(output(model, IDS), expected)


@each_kind
def test_unloading_a_merge_leaves_quantised_layers(kind: str) -> None:
    model = _adapted(kind)
    merged = model.merge_and_unload()
    plain = {type(layer) for layer in _quantised(kind).modules()}
    assert {type(layer) for layer in merged.modules()} == plain
    assert torch.isfinite(output(merged, IDS)).all()


@each_kind
def test_mixed_batch_is_row_by_row(kind: str) -> None:
    model = _adapted(kind)
    model.add_adapter("two", UoraConfig(r=5, target_modules="all-linear", frame_seed=9))
    randomise(model, "two", 5)
    model.eval()
    names = ["two", "default", "__base__"]
    mixed = output(model, IDS, adapter_names=names)
    for row, name in enumerate(names):
        alone = output(model, IDS[row : row + 1], adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@each_kind
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = _adapted(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_quantised(kind), tmp_path).eval()
    torch.testing.assert_close(output(loaded, IDS), output(model, IDS))


def test_a_weight_that_was_reordered_is_put_back() -> None:
    linear = nn.Linear(64, 32, bias=False)
    layer: Any = _four_bit(linear)
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu").eval()
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer(torch.ones(1, 64))  # reordered, where the CPU has AVX512-BF16
    keep_weight_layout(layer)
    layer(torch.ones(1, 64))
    found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(found, weight, atol=1e-3, rtol=0.0)


@each_kind
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_served(kind: str, method: str) -> None:
    spec = parse_adapter({"method": method, "r": 4})
    model = _quantised(kind)
    model = attach(model, spec, base=BaseWeights.of_model(model))
    before = output(model.eval(), IDS)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=spec.base_learning_rate)
    losses = []
    for _ in range(3):
        loss = model.train()(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = output(model.eval(), IDS)
    assert (trained - before).abs().max() > 1e-4

    artifact = loads(export(model, spec))
    base = _quantised(kind)
    again = load_artifact(base, artifact, base=BaseWeights.of_model(base))
    torch.testing.assert_close(output(again.eval(), IDS), trained)

    served = _quantised(kind)
    keep_weight_layout(served)
    alone = output(served, IDS)
    bank = AdapterBank(served, base_digest=PROVENANCE.base_digest)
    bank.check(artifact.manifest)
    bank.put(artifact)
    with bank.serving([artifact.manifest.digest, None, artifact.manifest.digest]):
        mixed = output(served, IDS)
    tolerance = 5e-2 if kind == "8-bit" else 1e-4  # 8-bit layers quantise their inputs, whose rounding may tip over
    for row, expected in enumerate((trained, alone, trained)):
        torch.testing.assert_close(mixed[row], expected[row], atol=tolerance, rtol=tolerance)
