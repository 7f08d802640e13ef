"""Which tokens are learned: those of assistant messages, with the token that ends the turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from uora.data.formats import ChatDataset, ChatRow
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


def check_lengths(dataset: ChatDataset, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> tuple[int, ...]:
    """The tokens of every row, all of which fit.

    Args:
        dataset: the rows.
        tokenizer: of the base model.
        max_tokens: of one row, the model's context.

    Raises:
        DataError: a row is too long (code ``example_too_long``), or the template cannot be used with it.
    """
    return tuple(len(example.input_ids) for example in encode_dataset(dataset, tokenizer, max_tokens=max_tokens))


def encode_dataset(dataset: ChatDataset, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Iterator[Example]:
    """`encode` every row, in order.

    Raises:
        DataError: as for `check_lengths`.
    """
    for row in dataset.rows:
        example = encode(row, tokenizer)
        if len(example.input_ids) > max_tokens:
            raise DataError(
                f"the row has {len(example.input_ids)} tokens; the base model takes {max_tokens}. "
                "Shorten or split the conversation.",
                line=row.line,
                code="example_too_long",
            )
        yield example


def encode(row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids and labels of one row.

    A message is learned from its first token to the special token that ends the turn; what the template puts
    after that (mostly a newline) is never generated and not learned.

    Raises:
        DataError: the template does not let the answer's tokens be told from the others (code
            ``unmaskable_template``), or refuses the row.
    """
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    try:
        rendering = render_text(tokenizer, messages, add_generation_prompt=False)
    except DataError as error:
        raise DataError(error.message, line=row.line, code=error.code) from error
    trained = {index for index, message in enumerate(row.messages) if message.trained}
    _expect_turns(rendering, trained, line=row.line)
    return _label(rendering, trained, tokenizer, line=row.line)


def _expect_turns(rendering: Rendering, trained: set[int], *, line: int) -> None:
    if lost := trained - {turn.message for turn in rendering.turns}:
        raise DataError(
            f"the tokens of the assistant's messages[{min(lost)}] cannot be found: the base model's chat "
            "template does not write a conversation as its beginning plus an answer there. An assistant message "
            "cannot come first; for templates that rewrite earlier turns, give the earlier assistant messages "
            "weight 0.",
            line=line,
            code="unmaskable_template",
        )


def _label(rendering: Rendering, trained: set[int], tokenizer: PreTrainedTokenizerBase, *, line: int) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    pieces = rendering.pieces()
    answers = _answers_by_piece(rendering, pieces)
    for index, ids in enumerate(tokenize(tokenizer, pieces)):
        turn = answers.get(index)
        learned = _learned(ids, tokenizer, line=line) if turn and turn.message in trained else 0
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


def _learned(ids: list[int], tokenizer: PreTrainedTokenizerBase, *, line: int) -> int:
    """How many of an answer's tokens are learned: all up to the last special one, which ends the turn."""
    special = set(tokenizer.all_special_ids)
    learned = next((count for count in range(len(ids), 0, -1) if ids[count - 1] in special), 0)
    after = cast(str, tokenizer.decode(ids[learned:]))  # one sequence in, one text out
    if learned and not after.strip():
        return learned
    raise DataError(
        "the base model's chat template ends an assistant message without a special token, so the model could "
        "not learn to stop. Use a model whose template ends each turn with one, such as <|im_end|>.",
        line=line,
        code="unmaskable_template",
    )
