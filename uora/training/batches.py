"""Examples to padded tensors, and batches to pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from uora.data import IGNORED, Example
from uora.models import Batch

#: What goes through a model at once: a batch's tensors, and what else the model is to know.
Piece = dict[str, Any]

#: Tokens, padding included, that go through the model at once, by device. It bounds the memory for activations
#: (``benchmarks.training`` measures it). Small pieces also have less padding, since rows of similar length go together:
#: 11 % instead of 36 % for batches of 16 movie reviews.
MAX_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}
#: The same for images.
MAX_IMAGES_AT_ONCE = {"cpu": 8, "cuda": 64}


def collate(examples: Sequence[Example]) -> Batch:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, longest)``."""
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def unpadded(batch: Batch) -> list[Example]:
    """The examples that `collate` made a batch of."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [Example(ids[:length], labels[:length]) for ids, labels, length in rows]


def split(batch: Batch, *, max_tokens: int) -> Iterator[Batch]:
    """The batch's rows in groups of similar length, each cut to its longest row.

    A group has at most ``max_tokens`` tokens, padding included; a row that is longer is a group by itself. Tensors
    are ``(rows, longest)``, or ``(rows,)`` for what a row has one of.
    """
    lengths = batch["attention_mask"].sum(dim=1)
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        rows = order[start : start + max(1, max_tokens // width)]
        yield {name: tensor[rows, :width] if tensor.dim() > 1 else tensor[rows] for name, tensor in batch.items()}
        start += len(rows)


def split_rows(batch: Batch, *, max_rows: int) -> Iterator[Batch]:
    """The batch's rows in groups of at most ``max_rows``."""
    rows = len(next(iter(batch.values())))
    for start in range(0, rows, max_rows):
        yield {name: tensor[start : start + max_rows] for name, tensor in batch.items()}
