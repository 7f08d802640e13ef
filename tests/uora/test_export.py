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

from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, TrainCase, Trained
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
