"""The script of docs/scaling.md is run as it stands, by the commands beside it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.support import chat_rows
from tests.tiny import make_tiny_llama
from uora.artifact import Artifact, loads
from worker.up import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(COMMANDS,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
PROGRAMS = {"python": ["-X", "faulthandler"], "torchrun": ["-m", "torch.distributed.run"]}


def run(command: str, folder: Path) -> tuple[Artifact, str]:
    """The adapter that a command makes, and what it prints."""
    program, *arguments = shlex.split(command, comments=True)
    here = ["--base", f"path:{make_tiny_llama(folder / 'base')}", "--cache", str(folder / "cache")]
    done = subprocess.run(
        [sys.executable, *PROGRAMS[program], *arguments, *here],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=150,
        stdout=subprocess.PIPE,
        text=True,
    )
    adapter = folder / "adapter.safetensors"
    found = loads(adapter.read_bytes())
    adapter.unlink()
    return found, done.stdout


def losses(printed: str) -> list[float]:
    """Of every step."""
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, flags=re.MULTILINE)]


def test_every_command_makes_the_same_run(tmp_path: Path) -> None:
    """In bfloat16, where that is what the machine takes: ``test_distributed`` compares adapters, in float32."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "rows.jsonl").write_bytes(chat_rows([("up", "down"), ("left", "right")] * 8))
    (adapter, printed), *others = [run(command, tmp_path) for command in COMMANDS.splitlines()]
    assert (len(others), len(losses(printed))) == (2, 2)
    for other, told in others:
        assert losses(told) == pytest.approx(losses(printed), rel=1e-3)
        assert other.manifest.modules == adapter.manifest.modules
        assert other.tensors.keys() == adapter.tensors.keys()
