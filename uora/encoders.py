"""How a base model takes the rows of a task, for reports on files that nobody trains on yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from uora.data import (
    ChatRow,
    CompletionRow,
    DatasetReport,
    Decode,
    Encode,
    Example,
    ImageRow,
    Overlong,
    Row,
    TextRow,
    build_report,
    detect_task,
    encode_chat,
    encode_completion,
    open_image,
    unreadable_report,
)
from uora.errors import DataError
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


def report_file(
    path: Path,
    base: LocalModel,
    *,
    task: Task | None,
    max_length: int | None = None,
    overlong: Overlong = "error",
    training: Path | None = None,
    n_previews: int = 1,
) -> DatasetReport:
    """What a base model finds in a file: the one report of the command line, of uploads and of jobs.

    Args:
        path: of the file.
        base: whose tokens are counted.
        task: what the rows are for; None to tell it by the first.
        max_length: tokens of a row at most; None for the model's context, beyond which it cannot be.
        overlong: what happens to longer rows.
        training: the training file, if this is the validation file beside it.
        n_previews: rows that are shown.

    Raises:
        BaseModelError: the base model has no tokenizer or image processor for the task.
    """
    try:
        told = task or detect_task(path)
    except DataError as error:
        return unreadable_report(path, error)
    encoder = row_encoder(told, base)
    return build_report(
        path,
        told,
        encode=encoder.encode,
        decode=encoder.decode,
        max_length=encoder.max_length(max_length),
        overlong=overlong,
        training=training,
        n_previews=n_previews,
    )


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
