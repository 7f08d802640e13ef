"""Files to reports: each row is read, encoded, counted and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from uora.data.containers import container_of
from uora.data.fitting import Overlong, fit, fit_length
from uora.data.formats import ImageRow, Problem, Row, TextRow, place
from uora.data.labels import Labels
from uora.data.masking import IGNORED, Example
from uora.data.reading import file_sha256, scan_file
from uora.data.recognising import detect_task, row_format_of
from uora.data.report import PREVIEW_TOKENS, DatasetReport, Preview, Segment
from uora.data.tally import Tally, content_digest
from uora.errors import DataError
from uora.spec import Task

#: A row as a model takes it: an example where tokens are learned, else how many tokens it has (an image: 0).
Encode = Callable[[Row], Example | int]
#: Token ids as text, special tokens included.
Decode = Callable[[list[int]], str]

#: Rows that are shown at most.
MAX_PREVIEWS = 3


def build_report(
    path: Path,
    task: Task,
    *,
    encode: Encode,
    decode: Decode,
    max_length: int | None,
    overlong: Overlong = "error",
    training: Path | None = None,
    n_previews: int = 1,
) -> DatasetReport:
    """Read a whole file and report on it. Problems of its content are in the report, none is raised.

    Args:
        path: of the file.
        task: what its rows are for (see `uora.data.detect_task`).
        encode: a row as the model takes it, of whatever length; its ``DataError`` is a problem of the row.
        decode: token ids as text, special tokens included.
        max_length: tokens of a row at most; None for any number.
        overlong: what happens to longer rows.
        training: the training file, if this is the validation file beside it.
        n_previews: rows that are shown, the first usable ones; at most 3.
    """
    trained_on = None if training is None else _TrainingFile.read(training, task)
    tally = Tally(None if trained_on is None else trained_on.digests)
    for found in scan_file(path, task):
        if isinstance(found, Problem):
            tally.add_problem(found)
            continue
        tally.add_row(found)
        try:
            if trained_on is not None:
                trained_on.check_label(found)
            trained = _add_encoded(tally, encode(found), max_length=max_length, overlong=overlong)
        except DataError as error:
            tally.add_problem(Problem(error.code, error.message, found.line, found.location), of_new_row=False)
        else:
            if trained is not None and len(tally.previews) < min(n_previews, MAX_PREVIEWS):
                tally.previews.append(_preview(found, trained, decode))
    for problem in _whole_file_problems(tally, task, training):
        tally.add_problem(problem)
    return _finish(tally, path, task)


def check_rows(path: Path, task: Task | None = None) -> DatasetReport:
    """What can be said about a file without a model: its rows, their problems, duplicates and labels, but no tokens.

    A row that is good here may still be too long for a model, and a class may still be the only one.

    Args:
        path: of the file.
        task: what its rows are for; None to tell it by the first.
    """
    try:
        told = task or detect_task(path)
    except DataError as error:
        return unreadable_report(path, error)
    tally = Tally()
    for found in scan_file(path, told):
        if isinstance(found, Problem):
            tally.add_problem(found)
        else:
            tally.add_row(found)
            tally.add_usable(0, truncated=False)
    return _finish(tally, path, told)


def unreadable_report(path: Path, error: DataError) -> DatasetReport:
    """The report on a file whose task cannot be told because of ``error``."""
    tally = Tally()
    message = error.message.removeprefix(f"{error.location}: ")
    tally.add_problem(Problem(error.code, message, error.line, error.location))
    return _finish(tally, path, None)


@dataclass(frozen=True)
class _TrainingFile:
    """What is remembered of the file that a validation file stands beside."""

    digests: frozenset[bytes]
    labels: Labels

    @classmethod
    def read(cls, path: Path, task: Task) -> _TrainingFile:
        digests: set[bytes] = set()
        labels: set[str] = set()
        for found in scan_file(path, task):
            if not isinstance(found, Problem):
                digests.add(content_digest(found))
                if (label := _label(found)) is not None:
                    labels.add(label)
        return cls(frozenset(digests), Labels(tuple(sorted(labels))))

    def check_label(self, row: Row) -> None:
        """Raises:
        DataError: the row is of a class that nothing is trained on (code ``unknown_label``).
        """
        if (label := _label(row)) is not None:
            self.labels.index(label)


def _label(row: Row) -> str | None:
    """A row's class, where it has one."""
    match row:
        case TextRow(label=str(label)) | ImageRow(label=label):
            return label
        case _:
            return None


def _add_encoded(
    tally: Tally, encoded: Example | int, *, max_length: int | None, overlong: Overlong
) -> Example | int | None:
    """Count a row as the model takes it; returns what of it is trained on."""
    tokens = _length(encoded)
    tally.add_length(tokens)
    trained = encoded if max_length is None else _fit(encoded, max_length=max_length, overlong=overlong)
    if trained is None:
        tally.add_dropped()
    else:
        tally.add_usable(trained, truncated=_length(trained) < tokens)
    return trained


def _length(encoded: Example | int) -> int:
    return len(encoded.input_ids) if isinstance(encoded, Example) else encoded


def _fit(encoded: Example | int, *, max_length: int, overlong: Overlong) -> Example | int | None:
    if isinstance(encoded, Example):
        return fit(encoded, max_length=max_length, overlong=overlong)
    return fit_length(encoded, max_length=max_length, overlong=overlong)


def _whole_file_problems(tally: Tally, task: Task, training: Path | None) -> Iterator[Problem]:
    if training is None and task in ("classification", "image-classification") and tally.labels:
        try:
            Labels.of(tally.labels)
        except DataError as error:
            yield Problem(error.code, error.message)
    if tally.has_nothing:
        yield Problem("no_usable_rows", "every row is left out; allow longer rows, or shorten them.")


def _finish(tally: Tally, path: Path, task: Task | None) -> DatasetReport:
    try:
        container = container_of(path)
    except DataError:
        return tally.report(file_sha256(path), container=None, row_format=None, task=task)
    row_format = None if task is None else row_format_of(path, container, task)
    return tally.report(file_sha256(path), container=container, row_format=row_format, task=task)


def _preview(row: Row, trained: Example | int, decode: Decode) -> Preview:
    if isinstance(trained, Example):
        shown = Example(trained.input_ids[:PREVIEW_TOKENS], trained.labels[:PREVIEW_TOKENS])
        segments, hidden = list(_token_segments(shown, decode)), len(trained.input_ids) - len(shown.input_ids)
    else:
        segments, hidden = list(_plain_segments(row)), 0
    return Preview(location=place(row) or "", segments=tuple(segments), hidden_tokens=hidden)


def _token_segments(example: Example, decode: Decode) -> Iterator[Segment]:
    """The text of each run of tokens: what it adds to that of all before it, as some decoders look back."""
    end, before = 0, ""
    for learned, run in groupby(example.labels, key=lambda label: label != IGNORED):
        start, end = end, end + len(list(run))
        text = decode(example.input_ids[:end])
        alone = text.removeprefix(before) if text.startswith(before) else decode(example.input_ids[start:end])
        yield Segment(text=alone, learned=learned)
        before = text


def _plain_segments(row: Row) -> Iterator[Segment]:
    match row:
        case TextRow():
            yield Segment(text=_beginning(row.text), learned=False)
            if row.text_pair is not None:
                yield Segment(text=_beginning(row.text_pair), learned=False)
            yield Segment(text=str(row.label), learned=True)
        case ImageRow():
            yield Segment(text=f"an image of {len(row.image):,} bytes", learned=False)
            yield Segment(text=row.label, learned=True)


def _beginning(text: str) -> str:
    return text if len(text) <= PREVIEW_TOKENS else text[:PREVIEW_TOKENS] + "..."
