"""Adapters of stock PEFT: with us they answer as with stock PEFT; what would not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.uora.task_cases import Recorder
from tests.uora.training.conftest import make_dataset
from uora import targets
from uora.artifact import Artifact, loads
from uora.errors import ArtifactError, FormatError, NonFiniteError, ShapeError
from uora.importing import PeftFolder, import_peft
from uora.methods import load_artifact
from uora.models import LocalModel, load_model, load_skeleton
from uora.spec import Hyperparameters, TrainingSpec
from uora.svd import BaseWeights
from uora.training import train

IDS = torch.randint(3, 30, (3, 7), generator=torch.Generator().manual_seed(0))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(base: LocalModel, config: PeftConfig, folder: Path) -> Tensor:
    """An adapter that does something, saved by stock PEFT; its logits."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.3 if "vera" in name else 0.1)
    model.save_pretrained(folder)
    return logits(model)


def read(folder: Path) -> PeftFolder:
    return PeftFolder(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    )


def imported(folder: PeftFolder, base: LocalModel, **options: Any) -> Artifact:
    content = import_peft(
        folder,
        modules=list(targets.linears(load_skeleton(base)).values()),
        base_model="tiny",
        base_digest=base.digest,
        chat_template_sha256="c" * 64,
        **options,
    )
    return loads(content)


def ours(item: Artifact, base: LocalModel) -> Tensor:
    model = load_model(base, dtype=torch.float32, device="cpu")
    return logits(load_artifact(model, item, base=BaseWeights.of_local(base, "chat", None)))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=16, target_modules=ALL),
        LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"),
        VeraConfig(r=8, target_modules=ALL),
        VeraConfig(r=8, target_modules=["q_proj"], projection_prng_key=7),
    ],
    ids=["lora", "rslora", "one-layer", "vera", "vera-key"],
)
def test_it_answers_as_with_stock_peft(tiny_base: LocalModel, config: PeftConfig, tmp_path: Path) -> None:
    expected = trained(tiny_base, config, tmp_path)
    item = imported(read(tmp_path), tiny_base)
    torch.testing.assert_close(ours(item, tiny_base), expected, atol=2e-5, rtol=1e-5)
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny_base.directory, dtype=torch.float32))
    assert (expected - plain).abs().max() > 1e-2
    assert (item.manifest.adapter.method, item.manifest.task) == ("lora", "chat")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_is_read_exactly(tiny_base: LocalModel, tmp_path: Path, dtype: torch.dtype) -> None:
    trained(tiny_base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    folder = PeftFolder(read(tmp_path).config, save(narrow))
    (module, own), *_ = imported(folder, tiny_base).parts()
    expected = narrow[f"base_model.model.{module.name}.lora_A.weight"].float()
    assert torch.equal(torch.from_numpy(own["lora_a"].copy()), expected)


def test_a_completion_model_has_no_template(tiny_base: LocalModel, tmp_path: Path) -> None:
    trained(tiny_base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    manifest = imported(read(tmp_path), tiny_base, task="completion").manifest
    assert (manifest.task, manifest.chat_template_sha256) == ("completion", None)


def test_a_job_can_start_from_it(tiny_base: LocalModel, tmp_path: Path) -> None:
    """After a step that changes nothing it is what it was."""
    trained(tiny_base, LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"]), tmp_path)
    item = imported(read(tmp_path), tiny_base)
    spec = TrainingSpec(
        adapter=item.manifest.adapter,
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=4, learning_rate_multiplier=1.0),
        learning_rate=1e-12,
        seed=0,
    )
    done = train(
        spec,
        base=tiny_base,
        training=make_dataset(4),
        validation=None,
        observer=Recorder(),
        cache_dir=None,
        dtype=torch.float32,
        warm_start=item,
    )
    for name, tensor in loads(done.artifact).tensors.items():
        np.testing.assert_allclose(tensor, item.tensors[name], atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"of_a_later_release": "something"}, "of_a_later_release"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"peft_type": "ADALORA"}, "peft_type"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"r": 0}, "adapter_config.json"),
    ({"r": 3}, "shape"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_computes_something_else_is_refused(
    tiny_base: LocalModel, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    trained(tiny_base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    good = read(tmp_path)
    config = json.dumps(json.loads(good.config) | changes).encode()
    with pytest.raises(ArtifactError, match=named):
        imported(PeftFolder(config, good.weights), tiny_base)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("q_proj", "z_proj"): tensor for name, tensor in tensors.items()}


def with_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"base_model.model.lm_head.bias": torch.ones(3)}


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


def in_integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.int8) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (renamed, ShapeError),
        (with_bias, FormatError),
        (without_one, ShapeError),
        (with_nan, NonFiniteError),
        (in_integers, FormatError),
        (lambda _: {}, FormatError),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tiny_base: LocalModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    error: type[ArtifactError],
) -> None:
    trained(tiny_base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    weights = save(change(load_file(tmp_path / "adapter_model.safetensors")))
    with pytest.raises(error):
        imported(PeftFolder(read(tmp_path).config, weights), tiny_base)


def test_a_vera_without_its_matrices_is_refused(tiny_base: LocalModel, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_projection"):
        trained(tiny_base, VeraConfig(r=8, target_modules=["q_proj"], save_projection=False), tmp_path)
    with pytest.raises(FormatError, match="save_projection=True"):
        imported(read(tmp_path), tiny_base)


def test_a_vera_that_would_be_too_large_as_lora_is_refused(tiny_base: LocalModel, tmp_path: Path) -> None:
    trained(tiny_base, VeraConfig(r=256, target_modules=ALL), tmp_path)
    with pytest.raises(ShapeError, match="As LoRA of rank 256"):
        imported(read(tmp_path), tiny_base, max_bytes=100_000)


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b"\xff", b'{"peft_type": "LORA"}'])
def test_what_is_no_config_is_refused(tiny_base: LocalModel, content: bytes) -> None:
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        imported(PeftFolder(content, b""), tiny_base)


def test_what_is_no_safetensors_is_refused(tiny_base: LocalModel) -> None:
    with pytest.raises(FormatError, match="no safetensors file"):
        imported(PeftFolder(b'{"peft_type": "LORA", "r": 4}', b"\x80\x04pickle"), tiny_base)
