"""Classes take their order from their names, not from the file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uora.data import Labels
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
