"""Reports: what they count is what is trained on, and what they show is what is learned."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_tiny_tokenizer
from tests.uora.data.files import png, write_array, write_lines, write_table, write_zip
from uora.data import (
    IGNORED,
    ChatRow,
    DatasetReport,
    Example,
    Overlong,
    Row,
    TextRow,
    build_report,
    encode_chat,
    fit,
    read_file,
    unreadable_report,
)
from uora.data.report import MAX_PROBLEMS, PREVIEW_TOKENS
from uora.errors import DataError
from uora.spec import Task

TINY = make_tiny_tokenizer()


def encode(row: Row) -> Example | int:
    """Chat rows as the tiny model takes them; a text has a token for each letter."""
    match row:
        case ChatRow():
            return encode_chat(row, TINY)
        case TextRow():
            return len(row.text)
        case _:
            return 0


def decode(ids: list[int]) -> str:
    return str(TINY.decode(ids))


def report_on(
    path: Path,
    task: Task = "chat",
    *,
    max_length: int | None = None,
    overlong: Overlong = "error",
    training: Path | None = None,
    n_previews: int = 1,
) -> DatasetReport:
    return build_report(
        path,
        task,
        encode=encode,
        decode=decode,
        max_length=max_length,
        overlong=overlong,
        training=training,
        n_previews=n_previews,
    )


def chat(question: str, *answers: str, **last: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in answers)]
    return {"messages": [*messages[:-1], {**messages[-1], **last}]}


def labelled(*rows: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in rows]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
chats = st.builds(
    lambda question, answer, again, last, weight: {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "weight": weight},
            {"role": "user", "content": again},
            {"role": "assistant", "content": last},
        ]
    },
    texts,
    texts,
    texts,
    texts,
    st.sampled_from([0, 1]),
)


@given(
    rows=st.lists(chats, min_size=1, max_size=4),
    max_length=st.integers(8, 120),
    overlong=st.sampled_from(["error", "truncate", "drop"]),
)
def test_the_report_is_of_what_is_trained_on(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], max_length: int, overlong: Overlong
) -> None:
    path = write_lines(tmp_path_factory.mktemp("files") / "upload", rows)
    report = report_on(path, max_length=max_length, overlong=overlong, n_previews=3)

    whole = [cast(Example, encode(row)) for row in read_file(path, "chat").rows]
    fitted = whole if overlong == "error" else [fit(one, max_length=max_length, overlong=overlong) for one in whole]
    too_long = [one for one in whole if len(one.input_ids) > max_length]
    trained = [one for one in fitted if one is not None and (overlong != "error" or one not in too_long)]
    assert report.rows_read == len(rows)
    assert report.rows_usable == len(trained)
    assert report.rows_dropped == (0 if overlong == "error" else len(rows) - len(trained))
    assert report.rows_truncated == (sum(one not in whole for one in trained) if overlong == "truncate" else 0)
    assert report.tokens == sum(len(one.input_ids) for one in trained)
    assert report.learned_tokens == sum(label != IGNORED for one in trained for label in one.labels)
    assert report.trainable == (report.problem_count == 0)
    assert report.trainable == bool(trained and (overlong != "error" or not too_long))

    assert report.lengths is not None
    lengths = [len(one.input_ids) for one in whole]
    edges = report.lengths.edges
    assert report.lengths.counts == tuple(
        sum(low <= length < high for length in lengths) for low, high in pairwise(edges)
    )
    assert sum(report.lengths.counts) == len(rows)
    assert report.lengths.max == max(lengths)

    assert len(report.previews) == min(3, len(trained))
    for preview, one in zip(report.previews, trained, strict=False):
        assert "".join(segment.text for segment in preview.segments) == decode(one.input_ids)
        learned = [label for label in one.labels if label != IGNORED]
        assert "".join(segment.text for segment in preview.segments if segment.learned) == decode(learned)

    assert DatasetReport.model_validate_json(report.model_dump_json()) == report


def test_percentiles_are_lengths_of_rows(tmp_path: Path) -> None:
    rows = labelled(*(("a" * tokens, float(tokens)) for tokens in range(1, 101)))
    lengths = report_on(write_lines(tmp_path / "upload", rows), "regression").lengths
    assert lengths is not None
    assert (lengths.p50, lengths.p95, lengths.max) == (50, 95, 100)
    assert (lengths.edges, lengths.counts) == ((0, 16, 32, 64, 128), (15, 16, 32, 37))


def test_all_problems_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": ""}]}  # empty, and nobody answers
    rows = [chat("a", "b"), *[bad] * 40, chat("c", "d" * 200)]
    report = report_on(write_lines(tmp_path / "upload", rows), max_length=100)
    assert (report.rows_read, report.rows_usable, report.problem_count) == (42, 1, 81)
    assert len(report.problems) == MAX_PROBLEMS
    assert [(problem.location, problem.code) for problem in report.problems[:3]] == [
        ("Line 2", "invalid_content"),
        ("Line 2", "no_assistant_message"),
        ("Line 3", "invalid_content"),
    ]
    assert not report.trainable

    report = report_on(write_lines(tmp_path / "upload", rows[-1:]), max_length=100)
    assert [(problem.location, problem.code) for problem in report.problems] == [("Line 1", "example_too_long")]
    assert (report.rows_read, report.rows_usable) == (1, 0)


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    one, two, three = chat("a", "b"), chat("a", "c"), chat("a", "b", weight=1)
    training = write_array(tmp_path / "training", [two, chat("x", "y"), chat("", "")])
    path = write_lines(tmp_path / "validation", [one, two, one, three, two, *[one] * 4])
    report = report_on(path, training=training)
    assert report.duplicates.count == 7
    assert report.duplicates.locations == ("Line 3", "Line 4", "Line 5", "Line 6", "Line 7")
    assert report.leak == 2
    assert report.trainable
    assert report_on(path).leak is None


def test_a_class_that_is_not_in_the_training_file_is_a_problem(tmp_path: Path) -> None:
    training = write_table(tmp_path / "training", labelled(("abc", "x"), ("de", "y")))
    path = write_table(tmp_path / "validation", labelled(("f", "y"), ("g", "z")))
    report = report_on(path, "classification", training=training)
    assert [(problem.location, problem.code) for problem in report.problems] == [("Line 3", "unknown_label")]
    assert (report.rows_read, report.rows_usable) == (2, 1)


def test_an_answer_that_is_not_learned_is_another_row(tmp_path: Path) -> None:
    rows = [chat("a", "b", "c"), {"messages": [*chat("a", "b", weight=0)["messages"], chat("a", "c")["messages"][1]]}]
    assert report_on(write_lines(tmp_path / "upload", rows)).duplicates.count == 0


def test_classes(tmp_path: Path) -> None:
    rows = labelled(("abc", "x"), ("de", "y"), ("f", "x"))
    report = report_on(write_table(tmp_path / "upload", rows), "classification", n_previews=9)
    assert report.labels == {"x": 2, "y": 1}
    assert (report.label_count, report.tokens, report.learned_tokens) == (2, 6, 0)
    assert (report.container, report.row_format, report.task) == ("csv", "text-class", "classification")
    assert [(segment.text, segment.learned) for segment in report.previews[0].segments] == [
        ("abc", False),
        ("x", True),
    ]
    assert len(report.previews) == 3


def test_one_class_is_no_classification_but_may_validate_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", labelled(("abc", "x"), ("de", "x")))
    assert [problem.code for problem in report_on(path, "classification").problems] == ["too_few_labels"]
    assert report_on(path, "classification", training=path).trainable


def test_many_classes_are_not_all_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", labelled(*((f"t{i}", f"l{i}") for i in range(150)), ("t", "l149")))
    report = report_on(path, "classification")
    assert report.label_count == 150
    assert report.labels is not None
    assert len(report.labels) == 100
    assert report.labels["l149"] == 2


def test_texts_in_the_place_of_classes_are_cut(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", labelled(("a", "x" * 300), ("b", "x" * 301), ("c", "y")))
    report = report_on(path, "classification")
    assert (report.labels, report.label_count) == ({"x" * 200 + "...": 2, "y": 1}, 3)


def test_numbers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", labelled(("a", -1), ("b", 4.5), ("c", 1)))
    numbers = report_on(path, "regression").numbers
    assert numbers is not None
    assert (numbers.min, numbers.max, numbers.mean) == (-1.0, 4.5, pytest.approx(1.5))


def test_huge_numbers_have_a_mean(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", labelled(*(("a", sign * 1.7e308) for sign in (1, 1, -1, -1, 1))))
    numbers = report_on(path, "regression").numbers
    assert numbers is not None
    assert numbers.mean == pytest.approx(3.4e307)


@pytest.mark.parametrize(("overlong", "usable", "tokens"), [("truncate", 2, 13), ("drop", 1, 3), ("error", 1, 3)])
def test_texts_that_are_too_long(tmp_path: Path, overlong: Overlong, usable: int, tokens: int) -> None:
    path = write_lines(tmp_path / "upload", labelled(("a" * 30, 1), ("abc", 2)))
    report = report_on(path, "regression", max_length=10, overlong=overlong)
    assert (report.rows_usable, report.tokens) == (usable, tokens)
    assert (report.rows_truncated, report.rows_dropped) == (overlong == "truncate", overlong == "drop")
    assert [problem.code for problem in report.problems] == (["example_too_long"] if overlong == "error" else [])


def test_nothing_left_is_a_problem(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", [chat("a" * 50, "b")])
    report = report_on(path, max_length=20, overlong="truncate")
    assert [problem.code for problem in report.problems] == ["no_usable_rows"]
    assert (report.rows_dropped, report.trainable) == (1, False)


def test_images(tmp_path: Path) -> None:
    members = {"cat/1.png": png(0), "dog/1.png": png(9), "dog/2.png": png(9), "dog/3.txt": b"?"}
    report = report_on(write_zip(tmp_path / "upload", members), "image-classification")
    assert (report.rows_read, report.rows_usable, report.tokens, report.lengths) == (4, 3, 0, None)
    assert report.labels == {"cat": 1, "dog": 2}
    assert report.duplicates.locations == ("File dog/2.png",)
    assert [problem.location for problem in report.problems] == ["File dog/3.txt"]
    assert report.previews[0].segments[0].text == f"an image of {len(png(0))} bytes"


@pytest.mark.parametrize(
    ("content", "code", "container"),
    [(b"", "empty_file", "jsonl"), (b"\x1f\x8b", "unknown_container", None), (b"[]", "empty_file", "json")],
)
def test_files_without_rows(tmp_path: Path, content: bytes, code: str, container: str | None) -> None:
    path = tmp_path / "upload"
    path.write_bytes(content)
    report = report_on(path)
    assert (report.container, report.rows_read, report.trainable) == (container, 0, False)
    assert [(problem.code, problem.location) for problem in report.problems] == [(code, None)]


def test_a_task_that_cannot_be_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", [{"question": "a"}])
    report = unreadable_report(path, DataError("found question.", line=1, location="Line 1", code="unknown_row_format"))
    assert (report.container, report.task, report.trainable) == ("jsonl", None, False)
    assert [tuple(problem.model_dump().values()) for problem in report.problems] == [
        ("unknown_row_format", "found question.", "Line 1")
    ]


def test_long_rows_are_shown_in_part(tmp_path: Path) -> None:
    report = report_on(write_lines(tmp_path / "upload", [chat("ab" * PREVIEW_TOKENS, "c")]))
    (preview,) = report.previews
    assert preview.hidden_tokens == report.tokens - PREVIEW_TOKENS
    assert sum(len(segment.text) for segment in preview.segments) < 2 * PREVIEW_TOKENS


@pytest.mark.parametrize("write", [write_lines, write_array, write_table])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, write: Callable[[Path, Sequence[Any]], Path]) -> None:
    path = write(tmp_path / "upload", labelled(*((f"{i} " * 1000, f"{i % 3}") for i in range(3000))))
    assert path.stat().st_size > 12_000_000
    tracemalloc.start()
    try:
        report = report_on(path, "classification")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.rows_usable == 3000
    assert peak < 3_000_000
