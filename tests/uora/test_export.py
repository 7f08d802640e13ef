"""Fine-tuned models for other servers: through the command line, loaded by stock transformers and stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner, Result

from tests.tiny import make_tiny_llama
from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, TrainCase, Trained, spec_of
from tests.uora.task_cases import run as run_training
from uora.artifact import Artifact, dumps, loads
from uora.cli import app
from uora.merging import merge, merged_dtype
from uora.methods import load_artifact
from uora.models import LocalModel, fetch, load_model
from uora.spec import METHODS, MethodName
from uora.svd import BaseWeights

IDS = torch.randint(3, 30, (3, 7), generator=torch.Generator().manual_seed(0))


def run(item: Artifact, folder: Path, *arguments: str) -> Result:
    """``export`` to ``folder/out``."""
    file = folder / "adapter.safetensors"
    file.write_bytes(dumps(item))
    return CliRunner().invoke(app, ["export", str(file), str(folder / "out"), *arguments])


def export(item: Artifact, base: LocalModel, folder: Path, *arguments: str) -> Path:
    """The same, for an adapter on a base model that no name leads to."""
    done = run(item, folder, "--model", f"path:{base.directory}", *arguments)
    assert done.exit_code == 0, done.output
    return folder / "out"


def make_other_llama(folder: Path) -> Path:
    """A base model with weights of its own."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_llama(folder))
    model.get_input_embeddings().weight.data.mul_(2)
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**(inputs or {"input_ids": IDS})).logits
    return found


def adapted(item: Artifact, base: LocalModel) -> nn.Module:
    """Our own forward, in float32."""
    manifest = item.manifest
    model = load_model(base, dtype=torch.float32, device="cpu", task=manifest.task, labels=manifest.labels)
    return load_artifact(model, item, base=BaseWeights.of_local(base, manifest.task, None))


def with_hits(run_: Trained) -> Artifact:
    """The run's adapter; a uora adapter as if frames had been drawn anew meanwhile."""
    item = run_.artifact
    if "hits" not in item.tensors:
        return item
    hits = np.arange(item.tensors["hits"].size, dtype=np.int32).reshape(item.tensors["hits"].shape) % 3
    return loads(dumps(Artifact(item.manifest, {**item.tensors, "hits": hits})))


@pytest.mark.parametrize("method", METHODS)
def test_stock_peft_answers_as_we_do(trained: TrainCase, method: MethodName, tmp_path: Path) -> None:
    base = trained("chat", method).base
    item = with_hits(trained("chat", method))
    out = export(item, base, tmp_path, "--to", "lora")
    stock = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    plain = logits(stock)
    found = logits(PeftModel.from_pretrained(stock, out))
    torch.testing.assert_close(found, logits(adapted(item, base)), atol=2e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize("method", METHODS)
def test_stock_transformers_answers_as_we_do(trained: TrainCase, method: MethodName, tmp_path: Path) -> None:
    base = trained("chat", method).base
    item = with_hits(trained("chat", method))
    out = export(item, base, tmp_path, "--to", "merged")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.float32
    torch.testing.assert_close(logits(model), logits(adapted(item, base)), atol=2e-5, rtol=1e-5)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (base.directory, out))
    assert theirs.get_vocab() == ours.get_vocab()
    assert theirs.get_chat_template() == ours.get_chat_template()
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (base.directory, out))
        assert after == before
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in base.directory.iterdir())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.iterdir())


@pytest.mark.parametrize("to", ["lora", "merged"])
@pytest.mark.parametrize("case", ["classification", "regression", "image-classification"])
def test_a_head_comes_along(trained: TrainCase, case: str, to: str, tmp_path: Path) -> None:
    done = trained(case, "uora")
    item, base = done.artifact, done.base
    out = export(item, base, tmp_path, "--to", to)
    auto: Any = AutoModelForImageClassification if case.startswith("image") else AutoModelForSequenceClassification
    if to == "merged":
        model = auto.from_pretrained(out)
        assert model.config.id2label == (dict(enumerate(item.manifest.labels)) or {0: "LABEL_0"})
        assert model.config.label2id == {label: i for i, label in model.config.id2label.items()}
        assert model.config.problem_type == ("single_label_classification" if item.manifest.labels else "regression")
    else:
        stock = auto.from_pretrained(base.directory, num_labels=len(item.manifest.labels) or 1)
        model = PeftModel.from_pretrained(stock, out)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images} if case.startswith("image") else {"input_ids": IDS}
    torch.testing.assert_close(logits(model, **inputs), logits(adapted(item, base), **inputs), atol=1e-4, rtol=1e-5)


def test_a_decoders_head_has_a_bias_that_transformers_has_no_place_for(trained: TrainCase, tmp_path: Path) -> None:
    done = trained("decoder", "uora")
    item, base = done.artifact, done.base
    failed = run(item, tmp_path, "--to", "merged", "--model", f"path:{base.directory}")
    assert failed.exit_code == 2
    assert "ExportError: transformers' LlamaForSequenceClassification has no parameter score.bias" in failed.output
    out = export(item, base, tmp_path, "--to", "lora")
    stock = AutoModelForSequenceClassification.from_pretrained(base.directory, num_labels=2)
    stock.config.pad_token_id = stock.config.get_text_config().pad_token_id
    stock.score.bias = nn.Parameter(torch.zeros(2))  # as docs/handover.md says
    found = logits(PeftModel.from_pretrained(stock, out))
    torch.testing.assert_close(found, logits(adapted(item, base)), atol=1e-4, rtol=1e-5)


def stored_as(base: LocalModel, folder: Path, **options: Any) -> LocalModel:
    """The base model in another form on disk: dtype, shards, quantisation."""
    shards = {"max_shard_size": options.pop("max_shard_size", "5GB")}
    AutoModelForCausalLM.from_pretrained(base.directory, **options).save_pretrained(folder / "base", **shards)
    AutoTokenizer.from_pretrained(base.directory).save_pretrained(folder / "base")
    return fetch("other", f"path:{folder / 'base'}", cache_dir=folder / "cache")


def moved_to(item: Artifact, base: LocalModel) -> Artifact:
    """The adapter as if it had been trained on this base model."""
    manifest = item.manifest.model_copy(update={"base_digest": base.digest})
    return loads(dumps(Artifact(manifest, item.tensors)))


def test_a_sum_is_rounded_once(trained: TrainCase, tmp_path: Path) -> None:
    """A bfloat16 base: as it is stored unless told otherwise, and float32 has what bfloat16 would round away."""
    base = stored_as(trained("chat", "uora").base, tmp_path, dtype=torch.bfloat16)
    item = moved_to(with_hits(trained("chat", "uora")), base)
    plain = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).state_dict()
    layers = load_artifact(
        load_model(base, dtype=torch.float32, device="cpu"), item, base=BaseWeights.of_local(base, "chat", None)
    ).base_model.adapter_layers("default")
    sums = {
        f"{name}.weight": plain[f"{name}.weight"] + layer.get_delta_weight("default") for name, layer in layers.items()
    }
    for dtype in ("", "bfloat16", "float16", "float32"):
        (tmp_path / dtype / "x").mkdir(parents=True, exist_ok=True)
        out = export(item, base, tmp_path / dtype / "x", "--to", "merged", *(["--dtype", dtype] if dtype else []))
        expected = getattr(torch, dtype or "bfloat16")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
        weights = model.state_dict()
        assert {weight.dtype for weight in weights.values()} == {expected}
        for name, weight in weights.items():
            exact = sums.get(name, plain[name])
            one_rounding = torch.finfo(expected).eps * exact.abs() + 1e-7
            assert ((weight.float() - exact).abs() <= one_rounding).all(), (dtype, name)


def test_a_quantised_base_is_written_in_bfloat16(trained: TrainCase, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; it quantises base models")
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = stored_as(trained("chat", "uora").base, tmp_path, quantization_config=four_bit, dtype=torch.float32)
    item = moved_to(with_hits(trained("chat", "uora")), base)
    out = export(item, base, tmp_path, "--to", "merged")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    exact = merge(item, base, dtype=torch.float32)
    torch.testing.assert_close(logits(exact), logits(adapted(item, base)), atol=1e-4, rtol=1e-4)
    assert merged_dtype(base) is torch.bfloat16


def test_a_sharded_base_leaves_no_index_behind(trained: TrainCase, tmp_path: Path) -> None:
    base = stored_as(trained("chat", "uora").base, tmp_path, dtype=torch.float32, max_shard_size="60KB")
    assert (base.directory / "model.safetensors.index.json").is_file()
    item = moved_to(trained("chat", "uora").artifact, base)
    out = export(item, base, tmp_path, "--to", "merged")
    assert [path.name for path in out.glob("*safetensors*")] == ["model.safetensors"]
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(adapted(item, base)), atol=2e-5, rtol=1e-5
    )


def test_tied_output_embeddings_are_untied(trained: TrainCase, tmp_path: Path) -> None:
    base = trained("chat", "uora").base
    spec = spec_of("chat", "uora", targets=("q_proj", "lm_head"))
    item = run_training(spec, base, CASES["chat"]).artifact
    out = export(item, base, tmp_path, "--to", "merged")
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(model), logits(adapted(item, base)), atol=2e-5, rtol=1e-5)
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_uora_is_a_verified_copy(trained: TrainCase, tmp_path: Path) -> None:
    item = trained("chat", "uora").artifact
    assert run(item, tmp_path, "--to", "uora").exit_code == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()
    again = run(item, tmp_path, "--to", "uora")
    assert (again.exit_code, "ExportError: " in again.output) == (2, True)


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_nothing_is_written_over_or_half_written(trained: TrainCase, to: str, tmp_path: Path) -> None:
    item, base = trained("chat", "uora").artifact, trained("chat", "uora").base
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "notes.txt"
    kept.write_text("mine")
    failed = run(item, tmp_path, "--to", to, "--model", f"path:{base.directory}")
    assert failed.exit_code == 2
    assert "is there already and not empty. Name a new directory" in failed.output
    assert kept.read_text() == "mine"
    kept.unlink()
    wrong = item.manifest.model_copy(update={"fingerprint": {name: [9.0] * 4 for name in item.manifest.fingerprint}})
    failed = run(Artifact(wrong, item.tensors), tmp_path, "--to", to, "--model", f"path:{base.directory}")
    assert (failed.exit_code, "FingerprintError: " in failed.output) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "out"]
    assert not any((tmp_path / "out").iterdir())
    assert export(item, base, tmp_path, "--to", to).is_dir()  # into the empty directory


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("uora", ("--to", "merged"), "--model says where the base model is."),
        ("osora", ("--to", "lora"), "--model says where the base model is."),
        ("uora", ("--to", "lora", "--dtype", "bfloat16"), "ExportError: --dtype is of merged models only"),
        ("uora", ("--to", "gguf"), "'gguf' is not one of"),
    ],
)
def test_errors_say_what_to_do(
    trained: TrainCase, method: MethodName, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    failed = run(trained("chat", method).artifact, tmp_path, *arguments)
    assert failed.exit_code == 2
    assert message in " ".join(failed.output.split())
    assert not (tmp_path / "out").exists()


def test_another_base_model_is_refused(trained: TrainCase, base_of: BaseOf, tmp_path: Path) -> None:
    other = base_of(make_other_llama)
    failed = run(trained("chat", "uora").artifact, tmp_path, "--to", "merged", "--model", f"path:{other.directory}")
    assert failed.exit_code == 2
    assert "ArtifactError: The adapter was trained on 'tiny' with digest" in failed.output


def test_numbers_that_a_dtype_cannot_hold(trained: TrainCase, tmp_path: Path) -> None:
    done = trained("chat", "lora")
    huge = Artifact(done.artifact.manifest, {name: tensor * 1e5 for name, tensor in done.artifact.tensors.items()})
    arguments = ("--to", "merged", "--model", f"path:{done.base.directory}", "--dtype")
    failed = run(huge, tmp_path, *arguments, "float16")
    assert (failed.exit_code, "NonFiniteError: " in failed.output) == (2, True)
    assert run(huge, tmp_path, *arguments, "bfloat16").exit_code == 0
