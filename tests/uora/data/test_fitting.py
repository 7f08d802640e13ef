"""Rows that are too long: refused, cut or left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uora.data import IGNORED, Example, Overlong, fit
from uora.errors import DataError

examples = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8).map(
    lambda tokens: Example([i for i, _ in tokens], [i if learned else IGNORED for i, learned in tokens])
)


@pytest.mark.parametrize("overlong", ["error", "truncate", "drop"])
@given(example=examples, more=st.integers(0, 3))
def test_what_fits_is_left_alone(overlong: Overlong, example: Example, more: int) -> None:
    assert fit(example, max_length=len(example.input_ids) + more, overlong=overlong) is example


@given(example=examples, max_length=st.integers(1, 7))
def test_a_cut_row_is_the_beginning_and_teaches_something(example: Example, max_length: int) -> None:
    cut = fit(example, max_length=max_length, overlong="truncate")
    beginning = Example(example.input_ids[:max_length], example.labels[:max_length])
    if len(example.input_ids) <= max_length or set(beginning.labels[1:]) - {IGNORED}:
        assert cut == beginning
    else:
        assert cut is None


def test_longer_rows_are_refused_or_left_out() -> None:
    example = Example([1, 2, 3], [IGNORED, 2, 3])
    assert fit(example, max_length=2, overlong="drop") is None
    with pytest.raises(DataError, match="the row has 3 tokens; at most 2 are taken") as caught:
        fit(example, max_length=2, overlong="error")
    assert caught.value.code == "example_too_long"
