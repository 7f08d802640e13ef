"""One rendering of a conversation, for training, validation and serving.

The text comes from the model's own chat template. It is cut where an assistant message begins and ends, and
each piece is tokenized by itself. A prompt's ids are therefore exactly the first ids of every training example
that goes on from it, also where a tokenizer would have merged the template's last newline with an answer's
leading whitespace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from uora.errors import BaseModelError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Turn:
    """Where an assistant message stands: ``text[start:end]``, with what the template puts after it."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """A conversation as text; ``turns`` are the assistant messages whose place is certain, in order."""

    text: str
    turns: tuple[Turn, ...]

    def pieces(self) -> list[str]:
        """The text, cut where a turn starts and where it ends; no piece is empty."""
        cuts = [0, *(cut for turn in self.turns for cut in (turn.start, turn.end)), len(self.text)]
        return [self.text[a:b] for a, b in pairwise(cuts) if a < b]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer: of the base model, with a chat template.
        messages: mappings with ``role`` (``developer`` is read as ``system``) and ``content``.
        add_generation_prompt: end with the opening of an assistant message, for generation.

    Raises:
        BaseModelError: the tokenizer has no chat template.
        DataError: the template refuses these messages.
    """
    rendering = render_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return [i for ids in tokenize(tokenizer, rendering.pieces()) for i in ids]


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> Rendering:
    """The conversation as the template writes it, and where its assistant messages are.

    A turn's place is found by rendering the conversation up to it: without the message and with the opening of
    an answer, and with the message. Where these are not the beginning of the whole text (the template looks
    ahead, or rewrites earlier turns), the turn is left out.

    Raises:
        BaseModelError, DataError: as for `render`.
    """
    text = _apply(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index > 0:
            prompt = _apply(tokenizer, messages[:index], add_generation_prompt=True)
            answered = _apply(tokenizer, messages[: index + 1], add_generation_prompt=False)
            grows = not turns or turns[-1].end <= len(prompt)
            if grows and answered.startswith(prompt) and text.startswith(answered):
                turns.append(Turn(index, len(prompt), len(answered)))
    return Rendering(text, tuple(turns))


def tokenize(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[list[int]]:
    """Token ids of each piece. The template has written all special tokens, so none are added."""
    ids: list[list[int]] = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return ids


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template's text.

    Raises:
        BaseModelError: the tokenizer has no chat template.
    """
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise BaseModelError(
            "The base model's tokenizer has no chat template, so conversations cannot be written for it. Use "
            "an instruction-tuned model, or add a chat_template.jinja to its directory.",
            code="no_chat_template",
        ) from error
    return template


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> str:
    template = _template(tokenizer)
    conversation = [{"role": _template_role(message["role"]), "content": message["content"]} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it raises jinja2's errors and Python's
        raise DataError(
            f"the chat template of the base model refuses these messages: {error}. Check the order of the roles.",
            code="template_error",
        ) from error
    return cast(str, text)  # as tokenize=False promises


def _template_role(role: str) -> str:
    return "system" if role == "developer" else role
