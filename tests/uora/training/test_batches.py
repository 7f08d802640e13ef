"""Padding and splitting lose nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from uora.data import IGNORED, Example
from uora.training.batches import collate, split, split_rows


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    rows = draw(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=9))
    return [
        Example(row, [token if draw(st.booleans()) else IGNORED for token in row])  # any mask will do here
        for row in rows
    ]


def rows_of(batch: dict[str, torch.Tensor]) -> list[Example]:
    """The examples of a batch without their padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [
        Example(ids[:length].tolist(), labels[:length].tolist())
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True)
    ]


@given(examples=example_lists())
def test_collate_pads_on_the_right(examples: list[Example]) -> None:
    batch = collate(examples)
    longest = max(len(example.input_ids) for example in examples)
    assert {tensor.shape for tensor in batch.values()} == {(len(examples), longest)}
    assert rows_of(batch) == examples
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()


@given(examples=example_lists(), max_tokens=st.integers(1, 40))
def test_split_keeps_every_row_within_the_bound(examples: list[Example], max_tokens: int) -> None:
    pieces = list(split(collate(examples), max_tokens=max_tokens))

    def key(example: Example) -> tuple[list[int], list[int]]:
        return example.input_ids, example.labels

    kept = [example for piece in pieces for example in rows_of(piece)]
    assert sorted(kept, key=key) == sorted(examples, key=key)
    for piece in pieces:
        rows, width = piece["input_ids"].shape
        assert rows * width <= max_tokens or rows == 1
        assert width == piece["attention_mask"].sum(dim=1).max()


@given(examples=example_lists(), max_tokens=st.integers(1, 40))
def test_what_a_row_has_one_of_stays_with_it(examples: list[Example], max_tokens: int) -> None:
    batch = collate(examples)
    batch["labels"] = batch["input_ids"].sum(dim=1)  # padding is 0
    for piece in split(batch, max_tokens=max_tokens):
        assert torch.equal(piece["labels"], piece["input_ids"].sum(dim=1))


@given(rows=st.integers(1, 20), max_rows=st.integers(1, 8))
def test_images_are_split_in_order(rows: int, max_rows: int) -> None:
    batch = {"pixel_values": torch.arange(rows).view(rows, 1, 1, 1), "labels": torch.arange(rows)}
    pieces = list(split_rows(batch, max_rows=max_rows))
    assert all(len(piece["labels"]) <= max_rows for piece in pieces)
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), tensor)
