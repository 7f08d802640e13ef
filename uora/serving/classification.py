"""Classes and numbers for texts and images, by many adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from uora.artifact import Manifest
from uora.models import ModelInputs
from uora.serving.bank import AdapterBank
from uora.serving.heads import Heads
from uora.serving.rows import Row

#: A text, a pair of texts, or an image file's bytes.
Item = str | tuple[str, str] | bytes
#: Probabilities of the adapter's classes, in its order; or, of a regression, a number.
Prediction = dict[str, float] | float


class Classifier:
    """A base model with a head. One thread calls it; it alone touches the model."""

    def __init__(self, model: PreTrainedModel, inputs: ModelInputs, bank: AdapterBank, heads: Heads) -> None:
        """
        Args:
            model: loaded for the task; `Heads` and `AdapterBank` were made on it, in this order.
            inputs: what turns items into the model's inputs.
            bank: its adapters.
            heads: their heads, the same that the bank was made with.
        """
        self._model = model
        self._inputs = inputs
        self._bank = bank
        self._heads = heads

    def predict(self, items: Sequence[Item], digests: Sequence[str]) -> list[Prediction]:
        """One forward over all items; row i is answered by the adapter ``digests[i]``.

        Raises:
            AdapterNotFoundError: an adapter is not resident, or has no head.
            DataError: an item does not fit the model, or is no image.
        """
        if len(items) != len(digests):
            raise ValueError(f"{len(items)} items and {len(digests)} adapters; expected one adapter for each item")
        rows = [self._bank.row(digest) for digest in digests]
        return self.answer([self._inputs.encode_item(item) for item in items], rows)

    @torch.inference_mode()
    def answer(self, encoded: Sequence[Any], adapters: Sequence[Row]) -> list[Prediction]:
        """`predict` for items as ``ModelInputs.encode_item`` gives them, and rows that their caller holds."""
        if not encoded:
            return []
        batch = {name: tensor.to(self._model.device) for name, tensor in self._inputs.collate(encoded).items()}
        with self._bank.running(self._bank.compose(adapters)), self._heads.serving(adapters):
            logits = self._model(**batch).logits.float().cpu()
        return [_prediction(each, row.manifest) for each, row in zip(logits, adapters, strict=True)]


def _prediction(logits: Tensor, manifest: Manifest) -> Prediction:
    if manifest.task == "regression":
        return float(logits[0])
    probabilities = logits[: len(manifest.labels)].softmax(0)
    return dict(zip(manifest.labels, probabilities.tolist(), strict=True))
