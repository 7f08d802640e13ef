"""Classes take their order from their names, not from the file; numbers have a mean and a deviation."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uora.data import Labels, Scale
from uora.errors import DataError


@given(found=st.lists(st.text(max_size=3), min_size=2).filter(lambda names: len(set(names)) > 1))
def test_labels_are_sorted_and_known(found: list[str]) -> None:
    labels = Labels.of(found)
    assert labels == Labels.of(reversed(found))
    assert list(labels.names) == sorted(set(found))
    assert [labels.names[labels.index(name)] for name in found] == found


@pytest.mark.parametrize("found", [[], ["a"], ["a", "a"]])
def test_one_class_cannot_be_told_apart(found: list[str]) -> None:
    with pytest.raises(DataError, match="at least two classes") as caught:
        Labels.of(found)
    assert caught.value.code == "too_few_labels"


def test_unknown_label_says_what_there_is() -> None:
    with pytest.raises(DataError, match=r"'z' is none of .* \('a', 'b', 'c', 'd', 'e' and 1 more\)") as caught:
        Labels.of("fedcba").index("z")
    assert caught.value.code == "unknown_label"


@given(numbers=st.lists(st.integers(-1000, 1000), min_size=2).filter(lambda found: len(set(found)) > 1))
def test_scale_leaves_mean_zero_and_deviation_one(numbers: list[int]) -> None:
    scale = Scale.of(numbers)
    found = [(number - scale.mean) / scale.deviation for number in numbers]
    assert statistics.fmean(found) == pytest.approx(0.0, abs=1e-9)
    assert statistics.pstdev(found) == pytest.approx(1.0)


def test_equal_numbers_have_a_scale() -> None:
    assert Scale.of([3.0, 3.0]) == Scale(3.0, 1.0)
