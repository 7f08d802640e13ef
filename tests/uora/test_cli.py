"""The command line: what users see, and what they see when they err."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.uora.toys import PROVENANCE, artifact_of, bert
from uora.artifact import dumps, stored_bytes
from uora.cli import app
from uora.models import LocalModel
from uora.spec import METHODS

pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["methods", *arguments])


def test_methods_shows_what_each_costs(tiny_base: LocalModel) -> None:
    shown = run("--model", f"path:{tiny_base.directory}", "--rank", "8")
    assert shown.exit_code == 0, shown.output
    rows = {match[1]: match[0] for match in re.finditer(r"│ (\w+) .*", shown.output)}
    assert set(rows) == set(METHODS)
    # Two layers of q, k, v, o, gate, up and down: r + out each (arXiv 2505.20154), r (in + out) for LoRA.
    sizes = 2 * [(48, 48), (48, 24), (48, 24), (48, 48), (48, 96), (48, 96), (96, 48)]
    assert f" {sum(8 + size_out for _, size_out in sizes):,} " in rows["uora"]
    assert f" {sum(8 * (size_in + size_out) for size_in, size_out in sizes):,} " in rows["lora"]
    assert "1.00 x" in rows["lora"]


@pytest.mark.parametrize("method", METHODS)
def test_the_size_is_that_of_a_real_adapter(method: str) -> None:
    item = artifact_of(method)
    # Names of the base model and digits of the probes differ by a few bytes.
    assert stored_bytes(item.manifest.adapter, item.manifest.modules) == pytest.approx(len(dumps(item)), abs=200)
    assert PROVENANCE.base_digest == item.manifest.base_digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "query,k_proj"), "TargetError: The target 'query' names no module"),
        (("--rank", "0"), "RankError: Method uora, r: found 0"),
        (("--model", "no-such-model"), "BaseModelError: "),
    ],
)
def test_errors_are_one_line(tiny_base: LocalModel, arguments: tuple[str, ...], message: str) -> None:
    failed = run("--model", f"path:{tiny_base.directory}", *arguments)
    assert failed.exit_code == 2
    assert message in failed.output
    assert "Traceback" not in failed.output


def test_an_encoder(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    shown = run("--model", f"path:{tmp_path}", "--task", "classification", "--targets", "q,v", "--rank", "8")
    assert shown.exit_code == 0, shown.output
    assert f" {2 * 2 * (8 + 32)} " in shown.output  # query and value of two layers of 32
