"""Which format the rows of a file have, and which task they are for, by the keys of its first row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

from uora.data.containers import container_of, read_records
from uora.data.formats import Container, Problem, Record, RowFormat
from uora.data.values import kind, shown
from uora.errors import DataError
from uora.spec import Task

#: The formats of a task; the first one is meant where no row tells.
FORMATS: dict[Task, tuple[RowFormat, ...]] = {
    "chat": ("messages", "sharegpt", "alpaca"),
    "completion": ("prompt-completion", "text"),
    "classification": ("text-class",),
    "regression": ("text-number",),
    "image-classification": ("image-class",),
}
#: One of these keys tells the formats of a task from each other.
_KEYS: dict[RowFormat, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
#: Of any format. Other keys of tables and Parquet files, where every row has every column, are absent where empty.
_REQUIRED = {"messages", "role", "content", "conversations", "from", "value"}
_REQUIRED |= {"instruction", "output", "prompt", "completion", "text", "label", "image"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def records_of(path: Path, container: Container, task: Task | None = None) -> Iterator[Record | Problem]:
    """The records of a file, those of columns as objects would be.

    Cells are strings: those of ``label`` become numbers where the task is regression and they can.
    """
    for found in read_records(path, container):
        if isinstance(found, Problem) or container not in ("csv", "parquet"):
            yield found
        else:
            value = _without_empty(found.value)
            if container == "csv" and task == "regression":
                value = _with_number(value)
            yield Record(value, found.line, found.location)


def _without_empty(value: object) -> object:
    match value:
        case dict():
            return {
                key: _without_empty(inner)
                for key, inner in value.items()
                if key in _REQUIRED or inner not in (None, "")
            }
        case list():
            return [_without_empty(inner) for inner in value]
        case _:
            return value


def _with_number(value: object) -> object:
    label = value.get("label") if isinstance(value, dict) else None
    if not isinstance(label, str) or not _NUMBER.fullmatch(label.strip()):
        return value
    return {**cast(dict[str, object], value), "label": float(label)}


def row_format_of(path: Path, container: Container, task: Task) -> RowFormat:
    """The format of the first row that has one of this task, else the first of the task's."""
    formats = FORMATS[task]
    if len(formats) == 1:
        return formats[0]
    rows = (found.value for found in records_of(path, container) if isinstance(found, Record))
    return next((told for row in rows if (told := told_format(row, task))), formats[0])


def told_format(row: object, task: Task) -> RowFormat | None:
    """The format among the task's whose keys a row has; None if it has none of them."""
    if not isinstance(row, dict):
        return None
    return next((each for each in FORMATS[task] if _KEYS.get(each, frozenset()) & row.keys()), None)


def detect_task(path: Path) -> Task:
    """What a file's rows are for, where nobody has said it.

    Told by the keys of the first row: ``messages``, ``conversations`` or ``instruction`` for chat; ``prompt`` or
    ``completion``, or ``text`` without ``label``, for completion; ``image`` for image-classification; ``text`` with a
    label that is a number for regression, else for classification. A CSV file has no numbers: it is for regression
    where every label looks like one and at least one has a fractional part, so that classes may be called 0 and 1.

    Raises:
        DataError: the first row cannot be read, or has the keys of no task (code ``unknown_row_format``).
    """
    container = container_of(path)
    record = _first(path, container)
    if not isinstance(record.value, dict):
        message = f"found {kind(record.value)}; expected an object."
        raise DataError(message, line=record.line, location=record.location, code="invalid_row")
    match record.value:
        case {"messages": _} | {"conversations": _} | {"instruction": _}:
            return "chat"
        case {"prompt": _} | {"completion": _}:
            return "completion"
        case {"image": _}:
            return "image-classification"
        case {"text": _, "label": str()} if container == "csv" and _has_fractions(path):
            return "regression"
        case {"text": _, "label": int() | float() as label} if not isinstance(label, bool):
            return "regression"
        case {"text": _, "label": _}:
            return "classification"
        case {"text": _}:
            return "completion"
    keys = ", ".join(map(shown, islice(record.value, 10))) or "no keys"
    raise DataError(
        f"found {keys}; expected messages, conversations, instruction and output, prompt and completion, text, text "
        "and label, or image and label.",
        line=record.line,
        location=record.location,
        code="unknown_row_format",
    )


def _first(path: Path, container: Container) -> Record:
    found = next(records_of(path, container), None)
    match found:
        case Record():
            return found
        case Problem():
            raise DataError(found.message, line=found.line, location=found.location, code=found.code)
        case None:
            raise DataError("The file has no rows; expected at least one.", code="empty_file")


def _has_fractions(path: Path) -> bool:
    """Whether every label of a CSV file is a number and some are no whole ones."""
    fractions = False
    for found in records_of(path, "csv", "regression"):
        match found:
            case Record(value={"label": float(number)}):
                fractions = fractions or not number.is_integer()
            case Record():
                return False
    return fractions
