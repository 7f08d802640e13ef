"""Rows of more tokens than a model takes, or than somebody wants to spend on them."""

from __future__ import annotations

from typing import Literal

from uora.data.masking import IGNORED, Example
from uora.errors import DataError

#: What happens to a row that is too long: an error, cut at its end, or left out.
Overlong = Literal["error", "truncate", "drop"]


def fit(example: Example, *, max_length: int, overlong: Overlong) -> Example | None:
    """The example with at most ``max_length`` tokens; None where it is left out.

    A row that is cut before its first learned token would teach nothing and is left out too; nothing comes before a
    row's first token to predict it from.

    Raises:
        DataError: it is longer, and ``overlong`` is ``error`` (code ``example_too_long``).
    """
    kept = fit_length(len(example.input_ids), max_length=max_length, overlong=overlong)
    if kept is None:
        return None
    if kept == len(example.input_ids):
        return example
    cut = Example(example.input_ids[:kept], example.labels[:kept])
    return cut if any(label != IGNORED for label in cut.labels[1:]) else None


def fit_length(tokens: int, *, max_length: int, overlong: Overlong) -> int | None:
    """How many of a row's tokens are kept; None where it is left out.

    Raises:
        DataError: there are more, and ``overlong`` is ``error`` (code ``example_too_long``).
    """
    if tokens <= max_length:
        return tokens
    match overlong:
        case "truncate":
            return max_length
        case "drop":
            return None
        case "error":
            raise DataError(
                f"the row has {tokens} tokens; at most {max_length} are taken. Shorten or split it, or let longer rows "
                "be cut or left out (overlong: truncate or drop).",
                code="example_too_long",
            )
