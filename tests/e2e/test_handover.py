"""The commands and the script of docs/handover.md are run as they stand, and its sizes are worked out again."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tiny import make_tiny_llama
from tests.uora.task_cases import CASES, run, spec_of
from uora import layout, targets
from uora.artifact import Artifact, Manifest, stored_bytes
from uora.convert import lora_files
from uora.models import fetch
from uora.spec import parse_adapter
from worker.up import ROOT

PAGE = (ROOT / "docs" / "handover.md").read_text()
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
SIZES = re.findall(r"^\| (\S+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| (\d+) \|$", PAGE, flags=re.MULTILINE)


def do(command: str, folder: Path, base: Path) -> str:
    """What a command prints."""
    program, *arguments = shlex.split(command.replace("BASE", str(base)))
    assert program == "python"
    if arguments[:3] == ["-m", "uora", "export"]:
        arguments += ["--model", f"path:{base}"]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=100,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def logits(folder: Path) -> Tensor:
    """Of some tokens."""
    ids = torch.arange(3, 24).view(3, 7)
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.float()
    return found


def test_every_command_runs_and_peft_merges_to_the_same(tmp_path: Path) -> None:
    base = fetch("tiny", f"path:{make_tiny_llama(tmp_path / 'base')}", cache_dir=tmp_path / "cache")
    trained = run(spec_of("chat", "uora"), base, CASES["chat"])
    (tmp_path / "adapter.safetensors").write_bytes(trained.result.artifact)
    (tmp_path / "use.py").write_text(SCRIPT)
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        assert do(command, tmp_path, base.directory).strip(), command
    merged = logits(tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged-by-peft"), merged, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(tmp_path / "small"), merged, atol=0.1, rtol=0.1)
    assert (logits(base.directory) - merged).abs().max() > 1e-3


@pytest.mark.parametrize(("chosen", "r", "adapter", "lora", "ratio"), SIZES)
def test_the_sizes_are_those_of_smollm2(chosen: str, r: str, adapter: str, lora: str, ratio: str) -> None:
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    spec = parse_adapter({"method": "lora", "r": int(r), "lora_alpha": int(r), "targets": chosen})
    modules = tuple(targets.find(model, spec.targets).values())
    as_lora = Artifact(
        Manifest(
            base_model="SmolLM2-135M-Instruct", base_digest="", data_sha256="", adapter=spec, modules=modules,
            fingerprint={},
        ),
        {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.shapes(spec, modules).items()},
    )  # fmt: skip
    written = sum(map(len, lora_files(as_lora).values()))
    stored = stored_bytes(parse_adapter({"method": "uora", "r": int(r), "targets": chosen}), modules)
    assert int(adapter.replace(",", "")) == pytest.approx(stored, abs=200)
    assert int(lora.replace(",", "")) == pytest.approx(written, abs=200)
    assert int(ratio) == round(written / stored)


def test_there_are_sizes() -> None:
    assert len(SIZES) == 4
