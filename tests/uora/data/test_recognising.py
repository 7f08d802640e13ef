"""Formats of rows, and the task of a file that names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.uora.data.files import png, write_array, write_lines, write_parquet, write_table, write_zip
from uora.data import ChatMessage, ChatRow, CompletionRow, Problem, detect_task, read_file, scan_file
from uora.errors import DataError
from uora.spec import Task

ASKED, TOLD = ChatMessage("user", "2+2?"), ChatMessage("assistant", "4", trained=True)
SYSTEM = ChatMessage("system", "Be brief.")
MESSAGES = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
TURNS = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
SHAREGPT = {"conversations": TURNS}
ALPACA = {"instruction": "2+2?", "output": "4"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (MESSAGES, (ASKED, TOLD)),
        (SHAREGPT, (ASKED, TOLD)),
        ({"id": "x7", "system": "Be brief.", **SHAREGPT}, (SYSTEM, ASKED, TOLD)),
        ({"system": "", **SHAREGPT}, (ASKED, TOLD)),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]}, (SYSTEM, ASKED, TOLD)),
        ({"conversations": [{**TURNS[0], "from": "user"}, {**TURNS[1], "from": "assistant"}]}, (ASKED, TOLD)),
        (ALPACA, (ASKED, TOLD)),
        ({**ALPACA, "input": "", "system": ""}, (ASKED, TOLD)),
        ({**ALPACA, "system": "Be brief."}, (SYSTEM, ASKED, TOLD)),
        ({**ALPACA, "input": "in\nshort"}, (ChatMessage("user", "2+2?\n\nin\nshort"), TOLD)),
    ],
)
def test_conversations_of_every_format(tmp_path: Path, row: Any, messages: tuple[ChatMessage, ...]) -> None:
    for write in (write_lines, write_array, write_parquet):
        path = write(tmp_path / "upload", [row, row])
        assert read_file(path, "chat").rows == (ChatRow(messages, 1), ChatRow(messages, 2))
        assert detect_task(path) == "chat"


def test_alpaca_as_a_table(tmp_path: Path) -> None:
    rows = [{**ALPACA, "input": ""}, {**ALPACA, "input": "now"}]
    path = write_table(tmp_path / "upload", rows)
    expected = (ChatRow((ASKED, TOLD), 2), ChatRow((ChatMessage("user", "2+2?\n\nnow"), TOLD), 3))
    assert read_file(path, "chat").rows == expected
    assert detect_task(path) == "chat"


def test_texts_are_completions_of_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "upload", [{"text": "once"}])
    assert read_file(path, "completion").rows == (CompletionRow("", "once", 1),)


@pytest.mark.parametrize(
    ("task", "first", "row", "code", "words"),
    [
        ("chat", SHAREGPT, MESSAGES, "mixed_formats", "of the format messages; the file's first is sharegpt"),
        ("chat", MESSAGES, ALPACA, "mixed_formats", "of the format alpaca; the file's first is messages"),
        ("chat", MESSAGES, {**MESSAGES, **SHAREGPT}, "unknown_key", "'conversations'"),
        ("completion", {"text": "a"}, {"prompt": "a", "completion": "b"}, "mixed_formats", "first is text"),
        ("completion", {"text": "a"}, {"text": "a", "label": "x"}, "unknown_key", "'label' is not supported; a row"),
        ("completion", {"text": "a"}, {"text": ""}, "invalid_content", "text is empty"),
        ("chat", SHAREGPT, 3, "invalid_row", 'found a number; expected an object {"conversations": [...]}'),
        ("chat", SHAREGPT, {**SHAREGPT, "tools": "x"}, "unknown_key", "'tools'"),
        ("chat", SHAREGPT, {**SHAREGPT, "system": 3}, "invalid_content", "system is a number"),
        ("chat", SHAREGPT, {}, "missing_messages", "conversations is null or missing"),
        ("chat", SHAREGPT, {"conversations": []}, "missing_messages", "conversations is an empty list"),
        ("chat", SHAREGPT, {"conversations": ["hi"]}, "invalid_message", "conversations[0] is a string"),
        ("chat", SHAREGPT, {"conversations": [{**TURNS[0], "weight": 1}]}, "unknown_key", "'weight'"),
        ("chat", SHAREGPT, {"conversations": [TURNS[0], {"from": "bot", "value": "x"}]}, "unknown_role", "'bot'"),
        ("chat", SHAREGPT, {"conversations": [{"from": ["gpt"], "value": "x"}]}, "unknown_role", "['gpt']"),
        ("chat", SHAREGPT, {"conversations": [{"from": "observation", "value": "x"}]}, "unknown_role", "tool calls"),
        ("chat", SHAREGPT, {"conversations": [{"from": "gpt"}]}, "invalid_content", "the value of conversations[0]"),
        ("chat", SHAREGPT, {"conversations": TURNS[:1]}, "no_assistant_message", "no turn is from gpt"),
        ("chat", ALPACA, {"instruction": "a"}, "missing_field", "output is missing; a row has instruction, optionally"),
        ("chat", ALPACA, {**ALPACA, "output": ""}, "invalid_content", "output is empty"),
        ("chat", ALPACA, {**ALPACA, "input": 3}, "invalid_content", "input is a number"),
        ("chat", ALPACA, {**ALPACA, "text": "x"}, "unknown_key", "'text'"),
    ],
)
def test_rows_are_of_the_format_of_the_first(
    tmp_path: Path, task: Task, first: Any, row: Any, code: str, words: str
) -> None:
    path = write_lines(tmp_path / "upload", [first, row])
    with pytest.raises(DataError) as caught:
        read_file(path, task)
    assert (caught.value.code, caught.value.line) == (code, 2)
    assert words in str(caught.value)


def test_a_broken_first_row_does_not_hide_the_format(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_text('{"text"\n{}\n{"text": "a"}\n{"text": "b"}\n')
    assert [isinstance(found, Problem) for found in scan_file(path, "completion")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (MESSAGES, "chat"),
        (SHAREGPT, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"text": "a"}, "completion"),
        ({"text": "a", "label": "x"}, "classification"),
        ({"text": "a", "text_pair": "b", "label": "1.5"}, "classification"),
        ({"text": "a", "label": True}, "classification"),
        ({"text": "a", "label": None}, "classification"),
        ({"text": "a", "label": 1}, "regression"),
        ({"text": "a", "label": 1.5}, "regression"),
        ({"image": "data:", "label": "x"}, "image-classification"),
    ],
)
def test_tasks_are_told_by_the_first_row(tmp_path: Path, row: Any, task: Task) -> None:
    assert detect_task(write_lines(tmp_path / "upload", [row])) == task
    assert detect_task(write_array(tmp_path / "upload", [row])) == task


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["0", "1"], "classification"),
        (["0", "1", "2.0"], "classification"),
        (["0", "1", "2.5"], "regression"),
        (["0", "1", "-.5e-3"], "regression"),
        (["0.5", "x"], "classification"),
        (["0.5", "nan"], "classification"),
        (["0.5", ""], "classification"),
        (["good", "bad"], "classification"),
    ],
)
def test_tables_are_for_regression_if_a_number_has_a_fraction(tmp_path: Path, labels: list[str], task: Task) -> None:
    path = write_table(tmp_path / "upload", [{"text": "a", "label": label} for label in labels])
    assert detect_task(path) == task


def test_names_of_classes_in_parquet(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["bad", "good"]}}}}
    rows = [{"text": "a", "label": 1}]
    assert detect_task(write_parquet(tmp_path / "upload", rows, **names)) == "classification"
    assert detect_task(write_parquet(tmp_path / "upload", rows)) == "regression"


def test_a_zip_is_of_images(tmp_path: Path) -> None:
    assert detect_task(write_zip(tmp_path / "upload", {"cat/1.png": png()})) == "image-classification"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", "empty_file", "The file has no rows"),
        (b"\x00", "unknown_container", "The file begins with"),
        (b"{", "invalid_json", "Line 1: not JSON"),
        (b"[3]", "invalid_row", "Row 1: found a number; expected an object."),
        (b'[{"question": "a", "answer": "b"}]', "unknown_row_format", "Row 1: found 'question', 'answer'; expected"),
        (b"{}", "unknown_row_format", "Line 1: found no keys"),
    ],
)
def test_files_without_a_task(tmp_path: Path, content: bytes, code: str, message: str) -> None:
    path = tmp_path / "upload"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        detect_task(path)
    assert caught.value.code == code
    assert str(caught.value).startswith(message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=3
)


@given(row=st.dictionaries(st.sampled_from(["text", "label", "image", "prompt", "messages"]), json_values, min_size=1))
def test_a_task_is_told_or_refused(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    path = write_lines(tmp_path_factory.mktemp("files") / "upload", [row])
    if row.keys() - {"label"}:
        assert detect_task(path)
    else:
        with pytest.raises(DataError):
            detect_task(path)
