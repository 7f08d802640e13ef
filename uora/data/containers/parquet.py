"""Parquet to records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uora.data.formats import Problem, Record

#: Of a row group, unpacked: a group is in memory while its rows are read.
MAX_GROUP_BYTES = 1 << 30
#: Rows that are values of Python at a time.
_BATCH_ROWS = 64


def read_parquet(path: Path) -> Iterator[Record | Problem]:
    """The rows, from row group to row group, and a problem where the file cannot be read on.

    Classes that Hugging Face's datasets wrote as numbers with a list of names (``ClassLabel``) are read as names.
    """
    number = 0
    try:
        for row in _rows(path):
            number += 1
            yield Record(row, number, f"Row {number}")
    except _errors() as error:
        message = f"the Parquet file cannot be read on after row {number}: {error}. Write it again."
        yield Problem("invalid_parquet", message)


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile  # the api has none

    with ParquetFile(path) as file:
        _check_size(file.metadata)
        names = _class_names(file.schema_arrow.metadata)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield _named(row, names) if names else row


def _check_size(metadata: Any) -> None:
    largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    if largest > MAX_GROUP_BYTES:
        raise ValueError(
            f"a row group has {largest:,} bytes unpacked, at most {MAX_GROUP_BYTES:,} are taken; choose a smaller "
            "row_group_size"
        )


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    """The names behind the numbers of the column ``label``; none if its numbers are numbers."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) else []


def _named(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    label = row.get("label")
    known = isinstance(label, int) and 0 <= label < len(names)
    return {**row, "label": names[label]} if known else row  # type: ignore[index]  # an int, as just seen
