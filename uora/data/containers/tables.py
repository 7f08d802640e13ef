"""CSV to records."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator

from uora.data.containers.lines import BYTE_ORDER_MARK, decoded
from uora.data.formats import Problem, Record
from uora.data.values import shown
from uora.errors import DataError

#: Characters of a cell; Python's own limit of 131,072 would refuse long texts and images.
MAX_CELL_CHARACTERS = 1 << 26


def read_table(lines: Iterable[bytes]) -> Iterator[Record | Problem]:
    """The cells of each row by the names of the header, with the line on which the row begins.

    Blank lines are skipped; a byte order mark is allowed. A row that cannot be read is the last: what stands inside of
    quotes after it is not known.
    """
    rows = _rows(lines)
    header = next(rows, None)
    if header is None:
        return
    if isinstance(header, Problem):
        yield header
    elif problem := _header_problem(header[1]):
        yield problem
    else:
        for row in rows:
            yield row if isinstance(row, Problem) else _record(row[1], header[1], row[0])


def _rows(lines: Iterable[bytes]) -> Iterator[tuple[int, list[str]] | Problem]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader(_texts(lines), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except DataError as error:
            yield Problem(error.code, error.message, reader.line_num + 1)
            return
        except csv.Error as error:
            message = f"not CSV: {error}. A cell with quotes, commas or newlines is quoted, its quotes doubled."
            yield Problem("invalid_csv", message, line)
            return
        if cells:
            yield line, cells


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield decoded(line if number else line.removeprefix(BYTE_ORDER_MARK))


def _header_problem(names: list[str]) -> Problem | None:
    for index, name in enumerate(names):
        if not name.strip() or name in names[:index]:
            found = f"{shown(name)} twice" if name.strip() else f"no name for column {index + 1}"
            return Problem("invalid_header", f"the header has {found}; expected a name of its own for each column.", 1)
    return None


def _record(cells: list[str], header: list[str], line: int) -> Record | Problem:
    if len(cells) != len(header):
        message = f"found {len(cells)} cells; the header has {len(header)} columns. Quote cells that have commas."
        return Problem("invalid_csv", message, line)
    return Record(dict(zip(header, cells, strict=True)), line, f"Line {line}")
