"""The command line: what users see, and what they see when they err."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.tiny import make_tiny_bert, make_tiny_vit
from tests.uora.conftest import BaseOf
from tests.uora.data.files import png, write_array, write_lines, write_zip
from tests.uora.toys import PROVENANCE, artifact_of, bert
from uora.artifact import dumps, stored_bytes
from uora.cli import app
from uora.data import DatasetReport
from uora.models import LocalModel
from uora.reportview import render_report
from uora.spec import METHODS

pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str, command: str = "methods") -> Result:
    return CliRunner().invoke(app, [command, *arguments])


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


def validate(path: Path, base: LocalModel, *arguments: str) -> Result:
    return run(str(path), "--model", f"path:{base.directory}", *arguments, command="validate")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_validate_shows_a_good_file(tmp_path: Path, tiny_base: LocalModel) -> None:
    path = write_array(tmp_path / "upload", [chat("the", "in"), chat("the", "in"), chat("a" * 99, "[bold]b[/bold]")])
    shown = validate(path, tiny_base)
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    for expected in (
        "file json, rows: messages",
        "task chat",
        "rows 3 read, 3 usable",
        "duplicates 1: Row 2",
        "trainable yes",
        "<|im_start|>assistant",
        "in<|im_end|>",
    ):
        assert expected in lines, shown.output
    assert any(re.fullmatch(r"16 - 31 2 █{40}", line) for line in lines)


def test_an_estimate_has_its_price(tmp_path: Path, tiny_base: LocalModel) -> None:
    path = write_lines(tmp_path / "upload", [chat("the", "in"), chat("a", "b"), chat("c", "d")])
    shown = validate(path, tiny_base, "--json", "--previews", "2", "--price-per-thousand-tokens", "1000")
    report = DatasetReport.model_validate_json(shown.output)
    assert report.estimate is not None
    assert report.estimate.cost == report.estimate.tokens
    assert len(report.previews) == 2
    priced = validate(path, tiny_base, "--price-per-thousand-tokens", "1000")
    lines = [" ".join(line.split()) for line in priced.output.splitlines()]
    assert f"cost {report.estimate.cost:,.2f}" in lines
    assert "cost" not in validate(path, tiny_base).output


def test_what_is_learned_is_bold(tmp_path: Path, tiny_base: LocalModel) -> None:
    path = write_array(tmp_path / "upload", [chat("the [red]", "[bold]b\x1b[31m")])
    report = DatasetReport.model_validate_json(validate(path, tiny_base, "--json").output)
    console = Console(force_terminal=True, width=200, file=io.StringIO())
    console.print(render_report(report))
    printed = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    assert "\x1b[1m[bold]b␛[31m<|im_end|>\x1b[0m" in printed  # what a row says is no command
    assert "\x1b[2muser\x1b[0m" in printed.replace("\x1b[2m<|im_start|>", "\x1b[2m")


def test_validate_shows_problems(tmp_path: Path, tiny_base: LocalModel) -> None:
    path = write_lines(tmp_path / "upload", [chat("the", "in"), chat("the", ""), chat("a" * 99, "b")])
    shown = validate(path, tiny_base, "--task", "chat", "--max-length", "40")
    assert shown.exit_code == 1, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert "2 problems" in lines
    assert "Line 2 invalid_content the content of messages[1] is empty; expected text." in lines
    assert any(line.startswith("Line 3 example_too_long the row has ") for line in lines)
    assert validate(path, tiny_base, "--task", "classification").exit_code == 1


@pytest.mark.parametrize(("overlong", "cut", "dropped"), [("truncate", 1, 0), ("drop", 0, 1)])
def test_validate_as_json(tmp_path: Path, tiny_base: LocalModel, overlong: str, cut: int, dropped: int) -> None:
    path = write_lines(tmp_path / "upload", [{"text": "the in"}, {"text": "in " * 30}])
    shown = validate(path, tiny_base, "--json", "--max-length", "16", "--overlong", overlong, "--training", str(path))
    assert shown.exit_code == 0, shown.output
    report = DatasetReport.model_validate_json(shown.output)
    assert (report.task, report.row_format) == ("completion", "text")
    assert (report.rows_truncated, report.rows_dropped) == (cut, dropped)
    assert report.leak == 2


def test_no_length_beyond_the_models_context(tmp_path: Path, tiny_base: LocalModel) -> None:
    path = write_lines(tmp_path / "upload", [{"text": "a" * 1100}])
    shown = validate(path, tiny_base, "--max-length", "5000", "--json")
    assert shown.exit_code == 1
    assert "the row has 1101 tokens; at most 1024 are taken" in shown.output


def test_validate_for_encoders(tmp_path: Path, base_of: BaseOf) -> None:
    rows = [{"text": "abc", "label": "x"}, {"text": "de" * 50, "text_pair": "f", "label": "y"}]
    path = write_lines(tmp_path / "upload", rows)
    shown = validate(path, base_of(make_tiny_bert), "--json", "--overlong", "truncate")
    report = DatasetReport.model_validate_json(shown.output)
    assert (report.task, report.labels, report.rows_truncated) == ("classification", {"x": 1, "y": 1}, 1)
    assert report.lengths is not None
    assert (report.tokens, report.lengths.max) == (5 + 64, 104)
    assert report.estimate is not None
    assert report.estimate.tokens == 10 * report.tokens  # two rows are learned in ten epochs


def test_validate_images(tmp_path: Path, base_of: BaseOf) -> None:
    half = png()[:-36]
    path = write_zip(tmp_path / "upload", {"cat/1.png": png(), "dog/1.png": png(9), "dog/2.png": half})
    shown = validate(path, base_of(make_tiny_vit))
    assert shown.exit_code == 1, shown.output
    assert re.search(r"File dog/2.png +invalid_image +the image cannot be read", shown.output)
    assert f"an image of {len(png())} bytes\ncat\n" in shown.output


@pytest.mark.parametrize(
    ("content", "words"),
    [("?", "unknown_container"), ('{"question": "a"}', "unknown_row_format"), ("", "empty_file")],
)
def test_a_file_that_tells_nothing_has_problems(
    tmp_path: Path, tiny_base: LocalModel, content: str, words: str
) -> None:
    path = tmp_path / "upload"
    path.write_text(content)
    shown = validate(path, tiny_base)
    assert shown.exit_code == 1, shown.output
    assert words in shown.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "no-such-model"),
        ("--task", "singing"),
        ("--overlong", "shorten"),
        ("--max-length", "0"),
        ("--training", "/no/such/file"),
    ],
)
def test_wrong_usage_is_not_a_bad_file(tmp_path: Path, tiny_base: LocalModel, arguments: tuple[str, ...]) -> None:
    path = write_lines(tmp_path / "upload", [chat("a", "b")])
    assert validate(path, tiny_base, *arguments).exit_code == 2
    assert validate(tmp_path / "nothing", tiny_base).exit_code == 2
