"""Files to rows: what is accepted, and what each bad line is told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uora.data import ChatMessage, ChatRow, Problem, read_chat_file, row_problems, scan_chat_file
from uora.errors import DataError

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

    dataset = read_chat_file(path)

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
    assert len(read_chat_file(path).rows) == 2


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
        read_chat_file(path)
    assert caught.value.code == code
    assert caught.value.line == 3
    assert str(caught.value).startswith("Line 3: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\n"])
def test_empty_file_is_one_problem_without_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no rows") as caught:
        read_chat_file(path)
    assert (caught.value.code, caught.value.line) == ("empty_file", None)


def test_scan_goes_on_after_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", messages(USER), GOOD, messages({**USER, "role": "x"}, {**USER, "extra": 1}))
    found = list(scan_chat_file(path))
    assert [(type(item), item.line) for item in found] == [
        (Problem, 1),
        (ChatRow, 2),
        (Problem, 3),
        (Problem, 3),
        (Problem, 3),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "weight"]) | st.text(), inner, max_size=4)
    ),
)


@given(row=json_values | json_values.map(lambda value: {"messages": [value]}))
def test_any_json_value_is_judged(row: Any) -> None:
    """Nothing that JSON can say breaks the checks, and every problem has a code and a message."""
    for problem in row_problems(row):
        assert problem.code
        assert problem.message
