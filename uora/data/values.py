"""JSON values in the words of an error message, and what makes a string a text."""

from __future__ import annotations

from collections.abc import Iterator

from uora.data.formats import Problem


def kind(value: object) -> str:
    """What JSON calls it."""
    match value:
        case None:
            return "null or missing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case bytes():
            return "bytes"
        case _:
            return "an object"


def shown(value: object) -> str:
    """The value itself, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def text_problems(value: object, what: str) -> Iterator[Problem]:
    """Why a value is no text: another type, empty, or half a character. ``what`` names it in the message."""
    if not isinstance(value, str):
        yield Problem("invalid_content", f"{what} is {kind(value)}; expected a string.")
    elif not value:
        yield Problem("invalid_content", f"{what} is empty; expected text.")
    elif not _is_encodable(value):
        yield Problem(
            "invalid_encoding",
            f"{what} has half of a surrogate pair (a \\ud800..\\udfff escape on its own), "
            "which is no character. Write the whole pair, or the character itself in UTF-8.",
        )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
