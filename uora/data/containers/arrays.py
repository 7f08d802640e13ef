"""One JSON array to records, item by item."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from uora.data.containers.lines import json_reason
from uora.data.formats import Problem, Record

#: Characters of one item at most: an array that is broken early is not read to its end.
MAX_ITEM_CHARACTERS = 1 << 26
_CHUNK_CHARACTERS = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_array(file: BinaryIO) -> Iterator[Record | Problem]:
    """The items of an array, and a problem where it cannot be read on."""
    text = _Text(io.TextIOWrapper(file, encoding="utf-8-sig"))
    number = 0
    try:
        text.take("[")
        while text.peek() != "]" or number:
            number += 1
            yield Record(text.value(), number, f"Row {number}")
            if text.peek() == "]":
                break
            text.take(",")
        text.take("]")
        text.expect_end()
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (0x{error.object[error.start]:02x}) here or soon after. Save the file as UTF-8."
        yield Problem("invalid_encoding", message, number or None, _location(number))
    except (ValueError, RecursionError) as error:
        message = f"not JSON: {json_reason(error)}. The file is one JSON array of objects."
        yield Problem("invalid_json", message, number or None, _location(number))


def _location(number: int) -> str | None:
    return f"Row {number}" if number else None


class _Text:
    """A text of which no more is held than the item that is read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._held = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]  # it matches anywhere
            if self._at < len(self._held) or not self._read_on():
                return self._held[self._at : self._at + 1]

    def take(self, character: str) -> None:
        """Go past a character that has to come next."""
        if self.peek() != character:
            raise ValueError(f"Expecting {character!r}")
        self._at += 1

    def value(self) -> object:
        """The next value. More is read until it is whole and something follows it, as in an array it must."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                reason = error.msg  # not the error: it holds on to all of the text
            else:
                if end < len(self._held):
                    self._at = end
                    return value
                reason = "Expecting ',' or ']'"
            if len(self._held) - self._at > MAX_ITEM_CHARACTERS or not self._read_on():
                raise ValueError(reason)

    def expect_end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise ValueError("Extra data after the array")

    def _read_on(self) -> bool:
        """Forget what was read and read as much again as is left; False at the end."""
        left = self._held[self._at :]
        more = self._file.read(max(_CHUNK_CHARACTERS, len(left)))
        self._held, self._at = left + more, 0
        return bool(more)
