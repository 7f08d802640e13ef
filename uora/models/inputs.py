"""What a model that answers with a class or a number takes: the same in training and in serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from uora.data import check_length, open_image
from uora.errors import DataError

#: One text's features, each as long as it has tokens: ``input_ids``, ``attention_mask`` and, for some models,
#: ``token_type_ids``.
Features = dict[str, list[int]]
Batch = dict[str, Tensor]
_ANY_LENGTH = 1 << 62


class ModelInputs(Protocol):
    """What turns a user's items into a batch for a model."""

    def encode_item(self, item: Any) -> Any:
        """One row, as `collate` takes it.

        Raises:
            DataError: the item does not fit the model.
        """

    def collate(self, rows: Sequence[Any]) -> Batch:
        """The batch of some rows."""

    def batch(self, items: Sequence[Any]) -> Batch:
        """One row for each item; errors of `encode_item`."""


@dataclass(frozen=True)
class TextInputs:
    """Texts, and pairs of texts, as token ids.

    Attributes:
        tokenizer: of the base model.
        max_tokens: of one row, special tokens included.
        pad_token: fills the shorter rows of a batch; the one that the model takes for padding.
        with_segments: whether the model tells the two texts of a pair apart by ``token_type_ids``.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    pad_token: int
    with_segments: bool

    def encode(self, text: str, text_pair: str | None = None, *, cut_to: int | None = None) -> Features:
        """The features of one row, with the special tokens that the tokenizer adds.

        Nothing is cut off, unless it is longer than ``cut_to`` tokens; the special tokens stay.

        Raises:
            DataError: it does not fit into the model (code ``example_too_long``), or has no tokens at all.
        """
        if text_pair is not None and not self._parts_pairs:
            text, text_pair = f"{text}\n{text_pair}", None
        found = self.tokenizer(
            text,
            text_pair,
            truncation=cut_to is not None,
            max_length=cut_to,
            return_token_type_ids=self.with_segments,
            return_attention_mask=True,
        )
        features: Features = dict(found)
        if not features["input_ids"]:
            raise DataError("the text has no tokens; expected words.", code="invalid_content")
        check_length(len(features["input_ids"]), max_tokens=self.max_tokens)
        return features

    def of_any_length(self) -> TextInputs:
        """The same without a limit, for who asks how long rows are."""
        return replace(self, max_tokens=_ANY_LENGTH)

    @property
    def _parts_pairs(self) -> bool:
        """Whether the tokenizer puts something between two texts; most decoders' do not."""
        added = self.tokenizer.num_special_tokens_to_add
        return added(pair=True) > added(pair=False)

    def encode_item(self, item: str | tuple[str, str]) -> Features:
        """`encode` of a text, or of a pair of texts."""
        return self.encode(item) if isinstance(item, str) else self.encode(*item)

    def batch(self, items: Sequence[str | tuple[str, str]]) -> Batch:
        """Texts, or pairs of texts, encoded and collated."""
        return self.collate([self.encode_item(item) for item in items])

    def collate(self, rows: Sequence[Features]) -> Batch:
        """The features of all rows, padded on the right, each ``(rows, longest)``."""
        return {name: self._pad([row[name] for row in rows], name) for name in rows[0]}

    def _pad(self, rows: list[list[int]], name: str) -> Tensor:
        padding = self.pad_token if name == "input_ids" else 0
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)


@dataclass(frozen=True)
class ImageInputs:
    """Image files as pixels, resized and normalised as the base model's image processor does it."""

    processor: Any

    def encode(self, image: bytes) -> bytes:
        """The file as it is: pixels take up to a thousand times its space, so they are made batch by batch.

        Raises:
            DataError: it cannot be read (code ``invalid_image``).
        """
        open_image(image)
        return image

    def encode_item(self, item: bytes) -> bytes:
        """`encode`, by the name that it has for every kind of input."""
        return self.encode(item)

    def batch(self, items: Sequence[bytes]) -> Batch:
        """Image files, encoded and collated."""
        return self.collate([self.encode(item) for item in items])

    def collate(self, images: Sequence[bytes]) -> Batch:
        """``pixel_values`` ``(rows, channels, height, width)``."""
        found = self.processor(images=[open_image(image) for image in images], return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}
