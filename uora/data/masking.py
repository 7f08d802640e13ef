"""Which tokens of a conversation are learned: those of assistant messages, with the token that ends the turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from uora.data.formats import ChatRow
from uora.data.templates import Rendering, Turn, render_text, tokenize
from uora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Label of a token that is not learned (the index that torch's cross entropy ignores).
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A row as ids: ``labels[i]`` is ``input_ids[i]`` where that token is learned, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


def encode_chat(row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids and labels of one conversation.

    A message is learned from its first token to the special token that ends the turn; what the template puts
    after that (mostly a newline) is never generated and not learned.

    Raises:
        DataError: the template does not let the answer's tokens be told from the others (code
            ``unmaskable_template``), or refuses the row.
    """
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    rendering = render_text(tokenizer, messages, add_generation_prompt=False)
    trained = {index for index, message in enumerate(row.messages) if message.trained}
    _expect_turns(rendering, trained)
    return _label(rendering, trained, tokenizer)


def _expect_turns(rendering: Rendering, trained: set[int]) -> None:
    if lost := trained - {turn.message for turn in rendering.turns}:
        raise DataError(
            f"the tokens of the assistant's messages[{min(lost)}] cannot be found: the base model's chat "
            "template does not write a conversation as its beginning plus an answer there. An assistant message "
            "cannot come first; for templates that rewrite earlier turns, give the earlier assistant messages "
            "weight 0.",
            code="unmaskable_template",
        )


def _label(rendering: Rendering, trained: set[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    pieces = rendering.pieces()
    answers = _answers_by_piece(rendering, pieces)
    for index, ids in enumerate(tokenize(tokenizer, pieces)):
        turn = answers.get(index)
        learned = _learned(ids, tokenizer) if turn and turn.message in trained else 0
        input_ids += ids
        labels += ids[:learned] + [IGNORED] * (len(ids) - learned)
    return Example(input_ids, labels)


def _answers_by_piece(rendering: Rendering, pieces: list[str]) -> dict[int, Turn]:
    starts = {turn.start: turn for turn in rendering.turns}
    position, answers = 0, {}
    for index, piece in enumerate(pieces):
        if position in starts:
            answers[index] = starts[position]
        position += len(piece)
    return answers


def _learned(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of an answer's tokens are learned: all up to the last special one, which ends the turn."""
    special = set(tokenizer.all_special_ids)
    learned = next((count for count in range(len(ids), 0, -1) if ids[count - 1] in special), 0)
    after = cast(str, tokenizer.decode(ids[learned:]))  # one sequence in, one text out
    if learned and not after.strip():
        return learned
    raise DataError(
        "the base model's chat template ends an assistant message without a special token, so the model could "
        "not learn to stop. Use a model whose template ends each turn with one, such as <|im_end|>.",
        code="unmaskable_template",
    )
