"""How a base model takes the rows of a task, for reports on files that nobody trains on yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from uora.data import (
    ChatRow,
    CompletionRow,
    Decode,
    Encode,
    Example,
    ImageRow,
    Row,
    TextRow,
    encode_chat,
    encode_completion,
    open_image,
)
from uora.models import LocalModel, context_tokens, load_image_inputs, load_text_inputs, load_tokenizer
from uora.spec import Task


@dataclass(frozen=True)
class RowEncoder:
    """What `uora.data.build_report` needs of a base model.

    Attributes:
        encode: a row as the model takes it, of whatever length.
        decode: token ids as text, special tokens included.
        max_tokens: of a row that the model takes; None where rows have no tokens.
    """

    encode: Encode
    decode: Decode
    max_tokens: int | None

    def max_length(self, asked: int | None) -> int | None:
        """Tokens of a row at most, where somebody asks for no more than so many."""
        limits = [limit for limit in (asked, self.max_tokens) if limit is not None]
        return min(limits) if limits and self.max_tokens is not None else None


def row_encoder(task: Task, base: LocalModel) -> RowEncoder:
    """The encoder of a task's rows for a base model.

    Raises:
        BaseModelError: the base model has no tokenizer or image processor for it.
    """
    match task:
        case "chat" | "completion":
            return _token_encoder(task, base)
        case "classification" | "regression":
            return _text_encoder(base)
        case "image-classification":
            load_image_inputs(base)
            return RowEncoder(_image_tokens, lambda _: "", None)


def _token_encoder(task: Task, base: LocalModel) -> RowEncoder:
    tokenizer = load_tokenizer(base)

    def encode(row: Row) -> Example:
        if task == "chat":
            return encode_chat(cast(ChatRow, row), tokenizer)
        return encode_completion(cast(CompletionRow, row), tokenizer)

    def decode(ids: list[int]) -> str:
        return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))  # one sequence in, one text out

    return RowEncoder(encode, decode, context_tokens(base))


def _text_encoder(base: LocalModel) -> RowEncoder:
    inputs = load_text_inputs(base)
    whole = inputs.of_any_length()

    def tokens(row: Row) -> int:
        text = cast(TextRow, row)
        return len(whole.encode(text.text, text.text_pair)["input_ids"])

    return RowEncoder(tokens, lambda _: "", inputs.max_tokens)


def _image_tokens(row: Row) -> int:
    open_image(cast(ImageRow, row).image)
    return 0
