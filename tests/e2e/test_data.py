"""The commands and scripts of docs/data.md as they stand, against the running service."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.e2e.support import EMBEDDED, Running, chat_rows
from uora.cli import app
from worker.up import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
VALIDATE, REPORT = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
UPLOAD, ESTIMATE, PARTS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ROWS = chat_rows([("up", "down"), ("left", "right")] * 8)


def validate(line: str, model: str) -> str:
    """Run a line of the page; what it prints, which its ``>`` may have put into a file."""
    command, _, target = line.partition(" > ")
    arguments = shlex.split(command.replace("smollm2-135m-instruct", model))
    assert arguments[:3] == ["python", "-m", "uora"]
    done = CliRunner().invoke(app, arguments[3:])
    assert done.exit_code == 0, f"{line}\n{done.output}"
    if target:
        Path(target).write_text(done.stdout)
    return done.stdout


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(ROWS)
    Path("valid.jsonl").write_bytes(chat_rows([("in", "out")]))
    return tmp_path


def test_before_anything_is_uploaded(base_models: dict[str, str], folder: Path) -> None:
    for line in VALIDATE.splitlines():
        validate(line, base_models["tiny"])
    told = json.loads((folder / "report.json").read_text())
    assert told["rows_usable"] == 16


@EMBEDDED
def test_at_the_upload_and_after(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = running.client("careful").api_key
    monkeypatch.setenv("OPENAI_BASE_URL", f"{running.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    names: dict[str, Any] = {}
    exec(UPLOAD, names)  # noqa: S102 - the page's own script
    assert capsys.readouterr().out.split()[0] == "processed"

    environment = {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": f"{running.url}/v1", "OPENAI_API_KEY": key}
    for line in REPORT.replace("SmolLM2-135M-Instruct", "tiny").splitlines():
        script = line.replace("curl -s", "curl -sS --fail-with-body")
        done = subprocess.run(
            ["/bin/sh", "-ec", script],
            env=environment | {"FILE": names["file"].id},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        json.loads(done.stdout)

    exec(ESTIMATE.replace("SmolLM2-135M-Instruct", "tiny"), names)  # noqa: S102 - the page's own script
    assert names["told"]["steps"] > 0
    capsys.readouterr()
    exec(PARTS, names)  # noqa: S102 - the page's own script
    assert capsys.readouterr().out.split()[1] in ("uploaded", "processed")
