"""The README's Python is run as it stands, against the running service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from tests.e2e.support import EMBEDDED, Running, chat_rows
from tests.uora.toys import PROVENANCE, llama
from worker.up import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@EMBEDDED
def test_the_job(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = running.client("reader")
    changes = {
        "http://127.0.0.1:8000": running.url,
        "sk-uora-...": client.api_key,
        "SmolLM2-135M-Instruct": "tiny",
    }
    code = BLOCKS[0]
    for written, here in changes.items():
        assert written in code
        code = code.replace(written, here)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(chat_rows([("up", "down"), ("left", "right")] * 8))
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 # our own documentation
    assert names["model"].startswith("ft:tiny:reader:reviews:")
    assert next(model.id for model in client.models.list()) == names["model"]


def test_the_library() -> None:
    names: dict[str, Any] = {"base_model": llama()}
    exec(BLOCKS[1], names)  # noqa: S102 # our own documentation
    assert isinstance(names["model"], PeftModel)
    assert names["model"].peft_config["default"].peft_type == "UORA"


def test_the_methods() -> None:
    names: dict[str, Any] = {"base_model": llama(), "another_base_model": llama(), "provenance": PROVENANCE}
    exec(BLOCKS[2], names)  # noqa: S102 # our own documentation
    assert names["again"].peft_config["default"].peft_type == "LORA"
