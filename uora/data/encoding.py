"""Rows to what a model takes, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from uora.data.formats import Dataset, Row
from uora.errors import DataError

RowT = TypeVar("RowT", bound=Row)
Encoded = TypeVar("Encoded")


def encode_rows(dataset: Dataset[RowT], encode: Callable[[RowT], Encoded]) -> Iterator[Encoded]:
    """``encode`` every row, in order.

    Raises:
        DataError: of the first row that ``encode`` refuses, with its place.
    """
    for row in dataset.rows:
        try:
            yield encode(row)
        except DataError as error:
            raise DataError(
                error.message, line=row.line, location=row.location, code=error.code, param=error.param
            ) from error


def check_length(tokens: int, *, max_tokens: int) -> None:
    """Make sure that a row fits into the model's context.

    Raises:
        DataError: it does not (code ``example_too_long``).
    """
    if tokens > max_tokens:
        raise DataError(
            f"the row has {tokens} tokens; the base model takes {max_tokens}. Shorten or split it.",
            code="example_too_long",
        )
