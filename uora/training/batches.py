"""Examples to padded tensors, and batches to pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uora.data import IGNORED, Example

Batch = dict[str, Tensor]


def collate(examples: Sequence[Example]) -> Batch:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, longest)``."""
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def split(batch: Batch, *, max_tokens: int) -> Iterator[Batch]:
    """The batch's rows in groups of similar length, each cut to its longest row.

    A group has at most ``max_tokens`` tokens, padding included; a row that is longer is a group by itself.
    """
    lengths = batch["attention_mask"].sum(dim=1)
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        rows = order[start : start + max(1, max_tokens // width)]
        yield {name: tensor[rows, :width] for name, tensor in batch.items()}
        start += len(rows)
