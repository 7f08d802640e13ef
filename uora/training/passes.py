"""How batches go through a causal model: packed where it allows it, with no more logits than are learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel

from uora.models import Batch
from uora.training.batches import MAX_TOKENS_AT_ONCE, Piece, split, unpadded
from uora.training.loss import keeps_masked_logits, predicting_positions
from uora.training.packing import Packer, make_packer


@dataclass(frozen=True)
class CausalPasses:
    """What a model allows.

    Attributes:
        masked: whether it computes logits for a mask of positions only.
        packer: how its rows are packed; None for padding.
    """

    masked: bool
    packer: Packer | None

    @classmethod
    def of(cls, model: PreTrainedModel, *, packing: bool) -> Self:
        """Find out, and have the model take packed rows if it can and ``packing`` wants it."""
        return cls(keeps_masked_logits(model), make_packer(model) if packing else None)

    def pieces(self, batch: Batch) -> Iterator[Piece]:
        """A collated batch in pieces of bounded size, ready for the model but for their labels."""
        max_tokens = MAX_TOKENS_AT_ONCE[batch["input_ids"].device.type]
        packed = self.packer and self.packer.pieces(unpadded(batch), max_tokens=max_tokens)
        for piece in packed or _padded(batch, max_tokens):
            if self.masked:
                piece["logits_to_keep"] = predicting_positions(piece["labels"])
            yield piece


def _padded(batch: Batch, max_tokens: int) -> Iterator[Piece]:
    for piece in split(batch, max_tokens=max_tokens):
        # A causal model's tokens never see the padding on their right; without a mask, attention takes a faster kernel.
        del piece["attention_mask"]
        yield piece
