"""Files to rows: what is accepted, and what each bad line is told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uora.data import (
    ChatMessage,
    ChatRow,
    CompletionRow,
    ImageRow,
    Problem,
    Row,
    RowFormat,
    TextRow,
    read_file,
    row_problems,
    scan_file,
)
from uora.data.formats import Record
from uora.data.recognising import FORMATS
from uora.data.rows import build_row
from uora.errors import DataError
from uora.spec import Task

GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def test_rows_keep_their_text_weights_and_lines(tmp_path: Path) -> None:
    conversation = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "héllo ☃"},
            {"role": "assistant", "content": " a\n", "weight": 0},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c", "weight": 1},
        ]
    }
    path = write(tmp_path / "data.jsonl", GOOD, b"", b"  \r", conversation, b"")

    dataset = read_file(path, "chat")

    assert [row.line for row in dataset.rows] == [1, 4]
    assert dataset.rows[1] == ChatRow(
        (
            ChatMessage("system", "Be brief."),
            ChatMessage("user", "héllo ☃"),
            ChatMessage("assistant", " a\n", trained=False),
            ChatMessage("user", "b"),
            ChatMessage("assistant", "c", trained=True),
        ),
        line=4,
    )
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_byte_order_mark_and_carriage_returns_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", GOOD)
    assert len(read_file(path, "chat").rows) == 2


def messages(*items: Any) -> dict[str, Any]:
    return {"messages": list(items)}


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        (b"\xff\xfe{", "invalid_encoding", "byte 1 is not UTF-8 (0xff)"),
        ('{"messages": "é"}'.encode("latin-1"), "invalid_encoding", "byte 15 is not UTF-8 (0xe9)"),
        (b'{"messages": [', "invalid_json", "not JSON: Expecting value at column 15"),
        (b"[" * 100_000, "invalid_json", "not JSON: "),
        (b"9" * 5_000, "invalid_json", "not JSON: "),
        ([1], "invalid_row", "found a list"),
        (None, "invalid_row", "found null"),
        ({}, "missing_messages", "no messages"),
        (messages(), "missing_messages", "messages is an empty list"),
        ({"messages": "hi"}, "missing_messages", "messages is a string"),
        ({**GOOD, "tools": []}, "unknown_key", "'tools'"),
        ({"prompt": "a", "completion": "b"}, "unknown_key", "'prompt'"),
        (messages(USER, "hello"), "invalid_message", "messages[1] is a string"),
        (messages({**USER, "name": "x"}, ANSWER), "unknown_key", "messages[0] has the key 'name'"),
        (messages({**USER, "role": "robot"}, ANSWER), "unknown_role", "messages[0] has the role 'robot'"),
        (messages({"content": "x"}, ANSWER), "unknown_role", "messages[0] has the role None"),
        (messages({**USER, "role": ["user"]}, ANSWER), "unknown_role", "messages[0] has the role ['user']"),
        (messages({**USER, "role": "tool"}, ANSWER), "unknown_role", "tool calls"),
        (messages(USER, {**ANSWER, "content": None}), "invalid_content", "messages[1] is null"),
        (messages(USER, {**ANSWER, "content": ""}), "invalid_content", "messages[1] is empty"),
        (messages(USER, {**ANSWER, "content": [{"type": "text"}]}), "invalid_content", "messages[1] is a list"),
        (messages(USER, {**ANSWER, "content": "\ud83d"}), "invalid_encoding", "surrogate"),
        (messages(USER, {**ANSWER, "weight": 2}), "invalid_weight", "messages[1] is 2"),
        (messages(USER, {**ANSWER, "weight": True}), "invalid_weight", "messages[1] is True"),
        (messages(USER, {**ANSWER, "weight": None}), "invalid_weight", "messages[1] is None"),
        (messages({**USER, "weight": 1}, ANSWER), "invalid_weight", "messages[0] has a weight"),
        (messages(USER), "no_assistant_message", "no message has the role assistant"),
        (messages(USER, {**ANSWER, "weight": 0}), "no_assistant_message", "weight 0"),
    ],
)
def test_bad_row_names_its_line_and_what_is_wrong(tmp_path: Path, row: Any, code: str, words: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(DataError) as caught:
        read_file(path, "chat")
    assert caught.value.code == code
    assert caught.value.line == 3
    assert str(caught.value).startswith("Line 3: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\n"])
def test_empty_file_is_one_problem_without_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no rows") as caught:
        read_file(path, "chat")
    assert (caught.value.code, caught.value.line) == ("empty_file", None)


def test_scan_goes_on_after_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", messages(USER), GOOD, messages({**USER, "role": "x"}, {**USER, "extra": 1}))
    found = list(scan_file(path, "chat"))
    assert [(type(item), item.line) for item in found] == [
        (Problem, 1),
        (ChatRow, 2),
        (Problem, 3),
        (Problem, 3),
        (Problem, 3),
    ]


MESSAGE_KEYS = ["messages", "role", "content", "weight", "conversations", "from", "value", "system"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(MESSAGE_KEYS) | st.text(), inner, max_size=4)
    ),
)
KEYS = ["prompt", "completion", "text", "text_pair", "label", "image", "instruction", "input", "output", "system"]
flat_rows = st.dictionaries(st.sampled_from(KEYS), json_values)


@pytest.mark.parametrize("row_format", [each for formats in FORMATS.values() for each in formats])
@given(
    row=json_values
    | json_values.map(lambda value: {"messages": [value]})
    | json_values.map(lambda value: {"conversations": [value]})
    | flat_rows
)
def test_any_json_value_is_judged(row_format: RowFormat, row: Any) -> None:
    """Nothing that JSON can say breaks the checks, every problem has a code and a message, and else there is a row."""
    problems = list(row_problems(row, row_format))
    assert all(problem.code and problem.message for problem in problems)
    assert problems or build_row(Record(row, 1, "Line 1"), row_format)


PNG = "data:image/png;base64,iVBORw0KGgo="
TEXT = {"text": "good", "label": "yes"}
NUMBER = {"text": "a", "text_pair": "b", "label": 2}
IMAGE = {"image": PNG, "label": "cat"}
PROMPT = {"prompt": "2+2=", "completion": " 4"}


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("completion", PROMPT, CompletionRow("2+2=", " 4", 2)),
        ("classification", TEXT, TextRow("good", None, "yes", 2)),
        ("classification", {**TEXT, "text_pair": "bad"}, TextRow("good", "bad", "yes", 2)),
        ("regression", NUMBER, TextRow("a", "b", 2.0, 2)),
        ("image-classification", IMAGE, ImageRow(b"\x89PNG\r\n\x1a\n", "cat", 2)),
    ],
)
def test_rows_of_every_task(tmp_path: Path, task: Task, row: Any, expected: Row) -> None:
    path = write(tmp_path / "data.jsonl", b"", row)
    dataset = read_file(path, task)
    assert dataset.rows == (expected,)
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("task", "row", "code", "words"),
    [
        ("completion", 3, "invalid_row", "found a number; expected an object with prompt and completion"),
        ("completion", GOOD, "unknown_key", "'messages'"),
        ("completion", {"prompt": "a"}, "missing_field", "completion is missing"),
        ("completion", {**PROMPT, "prompt": ""}, "invalid_content", "prompt is empty"),
        ("completion", {**PROMPT, "completion": None}, "invalid_content", "completion is null"),
        ("completion", {**PROMPT, "prompt": "\udc00"}, "invalid_encoding", "prompt has half"),
        (
            "classification",
            {"label": "x"},
            "missing_field",
            "text is missing; a row has text, optionally text_pair and",
        ),
        ("classification", {**TEXT, "text_pair": None}, "invalid_content", "text_pair is null"),
        ("classification", {**TEXT, "label": 1}, "invalid_label", "label is a number; expected the name of a class"),
        ("classification", {**TEXT, "label": ""}, "invalid_content", "label is empty"),
        ("regression", {**NUMBER, "label": "2"}, "invalid_label", "label is a string; expected a number"),
        ("regression", {**NUMBER, "label": True}, "invalid_label", "label is true or false"),
        ("regression", b'{"text": "a", "label": NaN}', "invalid_label", "label is nan; expected a finite number"),
        ("regression", {**NUMBER, "label": 10**400}, "invalid_label", "expected a finite number"),
        ("image-classification", {**IMAGE, "image": 3}, "invalid_image", "image: found a number"),
        ("image-classification", {**IMAGE, "image": "http://x/y.png"}, "invalid_image", "found 'http://x/y.png'"),
        ("image-classification", {**IMAGE, "image": PNG.replace("png", "svg")}, "invalid_image", "(or jpeg, or webp)"),
        ("image-classification", {**IMAGE, "image": PNG + "é"}, "invalid_image", "base64 cannot be read"),
        ("image-classification", {**IMAGE, "image": PNG + "="}, "invalid_image", "base64 cannot be read"),
        ("image-classification", {**IMAGE, "label": 3}, "invalid_label", "label is a number"),
    ],
)
def test_bad_row_of_every_task(tmp_path: Path, task: Task, row: Any, code: str, words: str) -> None:
    path = write(tmp_path / "data.jsonl", b"", row)
    with pytest.raises(DataError) as caught:
        read_file(path, task)
    assert (caught.value.code, caught.value.line) == (code, 2)
    assert words in str(caught.value)
