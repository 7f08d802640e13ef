"""OSoRA as a PEFT method: one list of behaviours over small models, against an oracle in NumPy."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.uora.toys import ALL_TOYS, VOCABULARY, llama
from uora import targets
from uora.errors import FingerprintError, RankError, ShapeError, UnsupportedLayerError
from uora.osora import OsoraConfig
from uora.quantised import keep_weight_layout
from uora.svd import BaseWeights, osora_pair
from uora.tuner._peft import register

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Error that rounding may leave, as a share of what the adapter changes.
ROUNDING = {torch.float32: 5e-5, torch.bfloat16: 0.2}
each_toy = pytest.mark.parametrize("toy", list(ALL_TOYS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
Array = NDArray[np.float64]


def oracle_weight(w0: Array, o: Array, s: Array) -> Array:
    """The adapted weight from the paper's formula, sharing no code with the implementation.

    W0 = U S0 V; the top r of it is taken out of W0 and put back with s in the place of S0 and scaled rows.
    w0 ``(out, in)``, o ``(out,)``, s ``(r,)``; what of s has no direction in W0 has no effect.
    """
    u, s0, v = np.linalg.svd(w0)
    adapted = w0.copy()
    for i in range(min(len(s), len(s0))):
        adapted -= s0[i] * np.outer(u[:, i], v[i])
        adapted += s[i] * np.diag(o) @ np.outer(u[:, i], v[i])
    return adapted


@torch.no_grad()
def output(model: nn.Module, x: Tensor, **kwargs: object) -> Tensor:
    """The model's main output."""
    found = model(x, **kwargs)
    if isinstance(found, Tensor):
        return found
    return found.logits if hasattr(found, "logits") else found[0]  # type: ignore[no-any-return]


def error(found: Tensor, expected: Tensor, untouched: Tensor) -> float:
    """Of an adapted model's output, as a share of what the adapter changes."""
    change = (expected.double() - untouched.double()).norm()
    return float((found.double() - expected.double()).norm() / change)


def build(toy: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return ALL_TOYS[toy].build().to(dtype)


def inputs(toy: str, dtype: torch.dtype = torch.float32, rows: int = 3) -> Tensor:
    x = ALL_TOYS[toy].inputs(rows)
    return x.to(dtype) if x.is_floating_point() else x


def config(toy: str = "llama", **options: object) -> OsoraConfig:
    names = list(targets.find(build(toy), ALL_TOYS[toy].targets))
    return OsoraConfig(**{"r": 8, "target_modules": names} | options)  # type: ignore[arg-type]


@torch.no_grad()
def randomise(model: nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Give an adapter vectors as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "osora_" in name and name.endswith(f".{adapter_name}"):
            parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


def adapted(toy: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A toy with one trained-looking adapter."""
    model = get_peft_model(build(toy, dtype), config(toy, **options))
    randomise(model)
    return model.eval()


def with_oracle_weights(toy: str, dtype: torch.dtype, model: PeftModel) -> nn.Module:
    """The plain base model whose weights are the oracle's."""
    plain = build(toy, dtype)
    for name, layer in model.base_model.adapter_layers("default").items():
        own = plain.get_submodule(name)
        weight = own.weight.double().detach()
        o, s = trained(layer)
        turned = isinstance(own, Conv1D)
        found = oracle_weight((weight.T if turned else weight).numpy(), o, s)
        own.weight.data = torch.from_numpy(found.T.copy() if turned else found).to(dtype)
    return plain


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 99))
def test_layer_is_the_papers(out: int, size_in: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(size_in, out)
    w0, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    model = get_peft_model(nn.Sequential(layer), OsoraConfig(r=r, target_modules=["0"]))
    randomise(model, seed=seed)
    o, s = trained(layer_of(model))
    x = torch.randn(3, size_in)
    expected = x.double().numpy() @ oracle_weight(w0, o, s).T + bias
    np.testing.assert_allclose(output(model, x), expected, atol=1e-5)


def trained(layer: nn.Module) -> tuple[Array, Array]:
    """o and s of the default adapter."""
    o, s = (vectors["default"].detach().double().numpy() for vectors in (layer.osora_o, layer.osora_s))
    return o, s


def layer_of(model: PeftModel) -> nn.Module:
    return next(iter(model.base_model.adapter_layers("default").values()))


@each_toy
@each_dtype
def test_starts_as_the_base_model_exactly(toy: str, dtype: torch.dtype) -> None:
    x = inputs(toy, dtype)
    model = get_peft_model(build(toy, dtype), config(toy)).eval()
    assert torch.equal(output(model, x), output(build(toy, dtype), x))
    for name, layer in model.base_model.adapter_layers("default").items():
        weight = targets.base_layer(build(toy, dtype).get_submodule(name)).weight.double()
        start = torch.linalg.svdvals(weight)[:8]
        torch.testing.assert_close(layer.osora_s["default"][: len(start)].double(), start, rtol=1e-6, atol=0)
        assert torch.equal(layer.osora_o["default"], torch.ones(layer.out_features))


@each_toy
@each_dtype
@pytest.mark.parametrize("r", [4, 40])  # 40 exceeds some of the sides
def test_forward_is_the_oracle_is_merge(toy: str, dtype: torch.dtype, r: int) -> None:
    x = inputs(toy, dtype)
    model = adapted(toy, dtype, r=r)
    expected, untouched = output(model, x), output(build(toy, dtype), x)
    found = {"oracle": output(with_oracle_weights(toy, dtype, model), x)}
    with model.disable_adapter():
        assert torch.equal(output(model, x), untouched)
    model.merge_adapter(safe_merge=True)
    found["merged"] = output(model, x)
    model.unmerge_adapter()
    found["unmerged"] = output(model, x)
    found["unloaded"] = output(model.merge_and_unload(), x)
    errors = {what: error(out, expected, untouched) for what, out in found.items()}
    assert max(errors.values()) < ROUNDING[dtype], errors


@each_toy
def test_forward_is_the_pair_in_stock_peft(toy: str) -> None:
    x = inputs(toy)
    model = adapted(toy)
    layers = model.base_model.adapter_layers("default")
    stock = get_peft_model(build(toy), LoraConfig(r=16, lora_alpha=16, target_modules=list(layers))).eval()
    for name, layer in layers.items():
        o, s = (vectors["default"].detach().numpy() for vectors in (layer.osora_o, layer.osora_s))
        a, b = osora_pair(layer.factors["default"], o, s)
        lora = stock.get_base_model().get_submodule(name)
        lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = map(torch.from_numpy, (a, b))
    torch.testing.assert_close(output(stock, x), output(model, x), atol=1e-5, rtol=1e-5)


@each_toy
@each_dtype
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_pretrained_round_trip_is_exact(toy: str, dtype: torch.dtype, low_memory: bool, tmp_path: Path) -> None:
    x = inputs(toy, dtype)
    model = adapted(toy, dtype)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = model.base_model.adapter_layers("default").values()
    assert sum(t.numel() for t in tensors.values()) == sum(layer.out_features + 8 for layer in layers)  # no factors
    assert "base_weights" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(build(toy, dtype), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(output(loaded, x), output(model, x))


@each_toy
@each_dtype
def test_mixed_batch_is_row_by_row(toy: str, dtype: torch.dtype) -> None:
    x = inputs(toy, dtype)
    model = adapted(toy, dtype)
    model.add_adapter("two", config(toy, r=5))
    model.add_adapter("three", config(toy, target_modules=list(model.base_model.adapter_layers("default"))[:1]))
    for seed, name in enumerate(("two", "three")):
        randomise(model, name, seed + 5)
    model.eval()
    rows = [0, 1, 2, 0, 1]
    names = ["two", "default", "__base__", "three", "two"]
    mixed = output(model, x[rows], adapter_names=names)
    # Against the same batch with one adapter for all rows: with one row, the base model's own products are rounded
    # otherwise on some processors, by as much as an adapter of one layer changes in its last digits.
    with model.disable_adapter():
        untouched = output(model, x[rows])
    for row, name in enumerate(names):
        if name == "__base__":
            torch.testing.assert_close(mixed[row], untouched[row])
        else:
            model.set_adapter(name)
            assert error(mixed[row], output(model, x[rows])[row], untouched[row]) < ROUNDING[dtype]


def test_second_adapter_delete_and_deepcopy() -> None:
    model = adapted()
    expected = output(model, IDS)
    model.add_adapter("two", config(r=4, target_modules=["q_proj"]))
    assert torch.equal(output(model.eval(), IDS), expected)
    twin = copy.deepcopy(model)
    randomise(twin, seed=9)
    assert not torch.equal(output(twin, IDS), expected)
    assert torch.equal(output(model, IDS), expected)  # the copy's vectors are its own
    model.delete_adapter("two")
    assert list(model.peft_config) == ["default"]
    assert not [key for key in model.state_dict() if key.endswith(".two")]
    assert all(list(layer.factors) == ["default"] for layer in model.base_model.adapter_layers("default").values())


def test_every_adapter_finds_all_linear_layers() -> None:
    model = get_peft_model(llama(), OsoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("two", OsoraConfig(r=4, target_modules="all-linear"))
    first, second = (model.base_model.adapter_layers(name) for name in ("default", "two"))
    assert list(second) == list(first) == list(targets.find(llama(), "all-linear"))


def test_adapters_of_one_rank_share_their_factors() -> None:
    model = adapted()
    model.add_adapter("two", config())
    model.add_adapter("three", config(r=4))
    for layer in [*model.base_model.adapter_layers("default").values(), layer_of(copy.deepcopy(model))]:
        assert layer.factors["two"] is layer.factors["default"]
        assert torch.equal(layer.factors["three"].u, layer.factors["default"].u[:, :4])


def test_training_moves_only_the_vectors() -> None:
    model = adapted().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "osora_" in name}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_dropout_works_in_training_only() -> None:
    model = adapted(dropout=0.5)
    expected = output(model, IDS)
    assert torch.equal(output(adapted(), IDS), expected)
    assert not torch.equal(output(model.train(), IDS), expected)


def test_a_rounded_base_takes_the_factors_of_the_exact_one() -> None:
    exact = BaseWeights.of_model(llama())
    model = get_peft_model(llama().to(torch.bfloat16), config(base_weights=exact))
    for name, layer in model.base_model.adapter_layers("default").items():
        assert layer.factors["default"] is exact.factors(name, 8)
        assert torch.equal(layer.osora_s["default"], exact.factors(name, 8).s)  # not rounded on the way
        assert layer.osora_o["default"].dtype is layer.osora_s["default"].dtype is torch.float32
    assert output(model, IDS).dtype is torch.bfloat16


def test_ranks_beyond_the_weights_own_have_no_effect() -> None:
    model = adapted("mlp", r=40).train()
    model(inputs("mlp")).sum().backward()
    for layer in model.base_model.adapter_layers("default").values():
        own = min(layer.in_features, layer.out_features)
        gradient = layer.osora_s["default"].grad
        assert gradient[:own].all()
        assert not gradient[own:].any()


def test_other_factors_are_refused_and_nothing_stays() -> None:
    model = adapted()
    expected = output(model, IDS)
    foreign = get_peft_model(llama(seed=1), config()).peft_config["default"].svd_fingerprint
    with pytest.raises(FingerprintError, match="expected"):
        model.add_adapter("foreign", config(svd_fingerprint=foreign))
    assert list(model.peft_config) == ["default"]
    assert not [key for key in model.state_dict() if key.endswith(".foreign")]
    assert torch.equal(output(model, IDS), expected)
    fresh = llama()
    with pytest.raises(FingerprintError):
        get_peft_model(fresh, config(svd_fingerprint=foreign))
    assert fresh.state_dict().keys() == llama().state_dict().keys()


def test_an_adapter_of_another_base_is_not_loaded(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(llama(seed=1), tmp_path)


def test_an_adapter_added_while_another_is_merged_has_the_factors_of_the_base() -> None:
    model = adapted()
    model.merge_adapter()
    model.add_adapter("two", config(r=4))  # PEFT unmerges first
    for layer in model.base_model.adapter_layers("two").values():
        torch.testing.assert_close(layer.factors["two"].s, layer.factors["default"].s[:4])


def test_a_missing_vector_is_an_error(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith("osora_s"))]
    save_file(tensors, path)
    with pytest.raises(ShapeError, match="lacks 1 tensors"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_unsupported_module_and_bad_values() -> None:
    with pytest.raises(UnsupportedLayerError, match="Embedding"):
        get_peft_model(llama(), OsoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(RankError, match="found 0"):
        OsoraConfig(r=0)


@each_dtype
def test_unmerge_is_exact_and_a_tied_weight_is_left_alone(dtype: torch.dtype) -> None:
    tied = llama().to(dtype)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    embeddings = tied.lm_head.weight.detach().clone()
    model = get_peft_model(tied, OsoraConfig(r=8, target_modules=["lm_head", "q_proj"]))
    randomise(model)
    expected = output(model.eval(), IDS)
    model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    model.unmerge_adapter()
    assert torch.equal(output(model, IDS), expected)


def test_safe_merge_refuses_a_broken_adapter() -> None:
    model = adapted()
    layer_of(model).osora_o["default"].data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_parameter_count_and_names() -> None:
    model = get_peft_model(llama(), config())
    sides = [layer.out_features for layer in model.base_model.adapter_layers("default").values()]
    assert model.get_nb_trainable_parameters()[0] == sum(sides) + 8 * len(sides)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"osora_o", "osora_s"}


def test_registering_twice_is_harmless() -> None:
    model = get_peft_model(llama(), config())
    assert register("osora", config_cls=OsoraConfig, model_cls=type(model.base_model)).value == "OSORA"


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int, tmp_path: Path) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before = output(quantised(bits), x)
    model = get_peft_model(quantised(bits), OsoraConfig(r=8, target_modules=["0"])).eval()
    assert torch.equal(output(model, x), before)
    randomise(model)
    after = output(model, x)
    w0 = BaseWeights.of_model(quantised(bits)).weight("0").double().numpy()
    o, s = trained(layer_of(model))
    change = x.double().numpy() @ (oracle_weight(w0, o, s) - w0).T
    np.testing.assert_allclose(after - before, change, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(quantised(bits), tmp_path).eval(), x), after)
    model.merge_adapter()
    assert error(output(model, x), after, before) < 0.5  # quantised anew
    model.unmerge_adapter()
    assert torch.equal(output(model, x), after)


def quantised(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; it quantises base models")
    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32) if bits == 4 else None
    layer = layer or bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu")).eval()
    keep_weight_layout(model)  # as `uora.models.load_model` does
    return model
