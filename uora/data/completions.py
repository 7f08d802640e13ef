"""Prompts and completions as token ids, for training and serving.

The two are tokenized one after the other, never as one text, so a prompt's ids are exactly the first ids of every
training example that goes on from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uora.data.formats import CompletionRow
from uora.data.masking import IGNORED, Example
from uora.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, after the token that begins a text where the tokenizer has its model see one."""
    return _begin(tokenizer) + _ids(tokenizer, prompt)


def encode_completion(row: CompletionRow, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids and labels of one row: the completion is learned, and the token that ends a text after it.

    Without a prompt the whole text is learned. Its first token is so only where the tokenizer puts one before it: there
    is nothing else to predict it from.

    Raises:
        BaseModelError: the tokenizer has no such token (code ``no_end_token``).
    """
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            "The base model's tokenizer has no token that ends a text, so the model could not learn to stop. Use a "
            "model whose tokenizer has an eos_token.",
            code="no_end_token",
        )
    prompt = prompt_ids(tokenizer, row.prompt)
    completion = [*_ids(tokenizer, row.completion), tokenizer.eos_token_id]
    given = max(1, len(prompt))
    ids = prompt + completion
    return Example(ids, [IGNORED] * given + ids[given:])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before any text, if that is what its model knows as a beginning."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
