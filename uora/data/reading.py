"""Files to rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from uora.data.containers import container_of
from uora.data.formats import Container, Dataset, Problem, Record, Row, RowFormat
from uora.data.recognising import records_of, row_format_of, told_format
from uora.data.rows import build_row
from uora.data.validation import row_problems
from uora.errors import DataError
from uora.spec import Task

#: What a file without rows lacks.
_EXPECTED: dict[Container, str] = {
    "jsonl": "one JSON object on each line",
    "json": "objects in the array",
    "csv": "lines below the header",
    "parquet": "at least one",
    "zip": "images",
}


def read_file(path: Path, task: Task) -> Dataset[Row]:
    """Read a file of a task's rows: its container and the rows' format are recognised by what is in it.

    See ``uora.data.containers`` for the first and ``uora.data.validation`` for the second.

    Raises:
        DataError: the first problem of the file, with its place and a stable ``code``.
    """
    rows = []
    for found in scan_file(path, task):
        if isinstance(found, Problem):
            raise DataError(found.message, line=found.line, location=found.location, code=found.code)
        rows.append(found)
    return Dataset(tuple(rows), file_sha256(path))


def file_sha256(path: Path) -> str:
    """Of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan_file(path: Path, task: Task) -> Iterator[Row | Problem]:
    """Every row of a file, or the problems in its place. An empty file is one problem without a place."""
    try:
        container = container_of(path)
    except DataError as error:
        yield Problem(error.code, error.message)
        return
    row_format = row_format_of(path, container, task)
    empty = True
    for found in records_of(path, container, task):
        empty = False
        if isinstance(found, Problem):
            yield found
        else:
            yield from _judged(found, row_format, task)
    if empty:
        yield Problem("empty_file", f"The file has no rows; expected {_EXPECTED[container]} ({task}).")


def _judged(record: Record, row_format: RowFormat, task: Task) -> Iterator[Row | Problem]:
    problems = list(_problems(record, row_format, task))
    yield from (replace(problem, line=record.line, location=record.location) for problem in problems)
    if not problems:
        yield build_row(record, row_format)


def _problems(record: Record, row_format: RowFormat, task: Task) -> Iterator[Problem]:
    told = told_format(record.value, task)
    if told not in (None, row_format):
        yield Problem("mixed_formats", f"found a row of the format {told}; the file's first is {row_format}. Use one.")
    else:
        yield from row_problems(record.value, row_format)
