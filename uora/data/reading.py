"""JSONL files to rows, line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uora.data.formats import ChatMessage, ChatRow, CompletionRow, Dataset, ImageRow, Problem, Role, Row, TextRow
from uora.data.images import from_data_url
from uora.data.validation import row_problems
from uora.errors import DataError
from uora.spec import Task

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_file(path: Path, task: Task) -> Dataset[Row]:
    """Read a JSONL file of a task's rows (see ``uora.data.validation``).

    Blank lines are skipped; a UTF-8 byte order mark is allowed.

    Raises:
        DataError: the first problem of the file, with its line and a stable ``code``.
    """
    rows = []
    for found in scan_file(path, task):
        if isinstance(found, Problem):
            raise DataError(found.message, line=found.line, code=found.code)
        rows.append(found)
    with path.open("rb") as file:
        return Dataset(tuple(rows), hashlib.file_digest(file, "sha256").hexdigest())


def scan_file(path: Path, task: Task) -> Iterator[Row | Problem]:
    """Every row of a file, or the problems in its place. An empty file is one problem without a line."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                empty = False
                yield from _scan_line(line, number, task)
    if empty:
        yield Problem("empty_file", f"The file has no rows; expected one JSON object on each line ({task}).")


def _scan_line(line: bytes, number: int, task: Task) -> Iterator[Row | Problem]:
    try:
        row = json.loads(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        yield Problem(
            "invalid_encoding",
            f"byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}). Save the file as UTF-8.",
            number,
        )
        return
    except (ValueError, RecursionError) as error:
        yield Problem("invalid_json", f"not JSON: {_reason(error)}. Each line is one JSON object.", number)
        return
    problems = [Problem(p.code, p.message, number) for p in row_problems(row, task)]
    yield from problems
    if not problems:
        yield _ROWS[task](row, number)


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at column {error.colno}"
        case RecursionError():
            return "nested too deeply"
        case _:
            return str(error)


def _chat_row(row: dict[str, Any], line: int) -> ChatRow:
    return ChatRow(tuple(_chat_message(message) for message in row["messages"]), line)


def _chat_message(message: dict[str, Any]) -> ChatMessage:
    role: Role = "system" if message["role"] == "developer" else message["role"]
    trained = role == "assistant" and message.get("weight", 1) == 1
    return ChatMessage(role, message["content"], trained=trained)


def _completion_row(row: dict[str, Any], line: int) -> CompletionRow:
    return CompletionRow(row["prompt"], row["completion"], line)


def _class_row(row: dict[str, Any], line: int) -> TextRow:
    return TextRow(row["text"], row.get("text_pair"), row["label"], line)


def _number_row(row: dict[str, Any], line: int) -> TextRow:
    return TextRow(row["text"], row.get("text_pair"), float(row["label"]), line)


def _image_row(row: dict[str, Any], line: int) -> ImageRow:
    return ImageRow(from_data_url(row["image"]), row["label"], line)


#: A row without problems as a value, by task.
_ROWS: dict[Task, Callable[[dict[str, Any], int], Row]] = {
    "chat": _chat_row,
    "completion": _completion_row,
    "classification": _class_row,
    "regression": _number_row,
    "image-classification": _image_row,
}
