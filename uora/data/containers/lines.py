"""JSON Lines to records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from uora.data.formats import Problem, Record
from uora.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(lines: Iterable[bytes]) -> Iterator[Record | Problem]:
    """The value of each line, or its problem. Blank lines are skipped; a byte order mark is allowed."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield _record(line, number)


def decoded(line: bytes) -> str:
    """A line's text.

    Raises:
        DataError: it is not UTF-8 (code ``invalid_encoding``).
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}). Save the file as UTF-8.",
            code="invalid_encoding",
        ) from error


def json_reason(error: Exception) -> str:
    """Why ``json`` could not read something, in a few words."""
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at column {error.colno}"
        case RecursionError():
            return "nested too deeply"
        case _:
            return str(error)


def _record(line: bytes, number: int) -> Record | Problem:
    try:
        return Record(json.loads(decoded(line).rstrip("\r\n")), number, f"Line {number}")
    except DataError as error:
        return Problem(error.code, error.message, number)
    except (ValueError, RecursionError) as error:
        message = f"not JSON: {json_reason(error)}. Each line is one JSON object."
        return Problem("invalid_json", message, number)
