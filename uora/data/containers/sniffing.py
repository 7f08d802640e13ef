"""Which container a file is, by its first bytes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from uora.data.containers.lines import BYTE_ORDER_MARK
from uora.data.formats import Container
from uora.errors import DataError

_HEAD_BYTES = 1 << 16
_PARQUET = b"PAR1"
#: Of a zip's first member, and of a zip without any.
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
#: A line that has one of these among its cells is the header of a table.
_COLUMNS = {"text", "label", "prompt", "completion", "instruction", "output", "image", "messages", "conversations"}


def container_of(path: Path) -> Container:
    """The container of a file; that of a file without any content is jsonl.

    Raises:
        DataError: it is none that is read (code ``unknown_container``).
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_PARQUET):
        return "parquet"
    if head.startswith(_ZIP):
        return "zip"
    return _text_container(head.removeprefix(BYTE_ORDER_MARK).lstrip())


def _text_container(head: bytes) -> Container:
    first_line = head.partition(b"\n")[0]
    if head.startswith(b"["):
        return "json"
    if head.startswith(b"{") or not head or _is_json(first_line):
        return "jsonl"
    if _is_header(first_line):
        return "csv"
    raise DataError(
        f"The file begins with {first_line[:20]!r}. Expected JSON Lines (an object on each line), a JSON array of "
        "objects, CSV with a header of known names and commas between, Parquet, or a zip of images, in UTF-8.",
        code="unknown_container",
    )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_header(line: bytes) -> bool:
    try:
        return bool(_COLUMNS.intersection(*csv.reader([line.decode().rstrip("\r")], strict=True)))
    except (csv.Error, UnicodeDecodeError):
        return False
