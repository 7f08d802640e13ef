"""What is counted while a file is read: a hash of each row, a count of each length and of each class, and sums."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field, replace

from uora.data.formats import Container, ImageRow, Problem, Row, RowFormat, TextRow, place
from uora.data.masking import IGNORED, Example
from uora.data.report import (
    MAX_LABEL_CHARACTERS,
    MAX_LABELS,
    MAX_LOCATIONS,
    MAX_PROBLEMS,
    DatasetReport,
    Duplicates,
    Lengths,
    NumberRange,
    Preview,
    ReportedProblem,
)
from uora.spec import Task

_DIGEST_BYTES = 16
#: Lengths below it are counted together; from there on the edges double.
_FIRST_EDGE = 16


def content_digest(row: Row) -> bytes:
    """A hash of all that a row says, wherever it stands."""
    content = repr(replace(row, line=0, location=None)).encode()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


@dataclass
class Tally:
    """Grows by a row or a problem at a time."""

    #: Hashes of the training file's rows; None where there is no such file.
    trained_on: frozenset[bytes] | None = None
    previews: list[Preview] = field(default_factory=list)
    _rows_read: int = 0
    _rows_usable: int = 0
    _rows_truncated: int = 0
    _rows_dropped: int = 0
    _tokens: int = 0
    _learned_tokens: int = 0
    _lengths: Counter[int] = field(default_factory=Counter)
    _seen: set[bytes] = field(default_factory=set)
    _duplicates: int = 0
    _duplicate_locations: list[str] = field(default_factory=list)
    _leak: int = 0
    _labels: Counter[str] = field(default_factory=Counter)
    _number_count: int = 0
    _mean: float = 0.0
    _least: float = math.inf
    _most: float = -math.inf
    _problems: list[ReportedProblem] = field(default_factory=list)
    _problem_count: int = 0
    _last_bad: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of the rows so far."""
        return tuple(self._labels)

    @property
    def has_nothing(self) -> bool:
        """Whether there is neither a usable row nor a reason for that."""
        return not self._rows_usable and not self._problem_count

    def add_problem(self, problem: Problem, *, of_new_row: bool = True) -> None:
        """Count a problem. Problems of one place that follow each other are of one row."""
        location = place(problem)
        self._problem_count += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(ReportedProblem(code=problem.code, message=problem.message, location=location))
        if of_new_row and location not in (None, self._last_bad):
            self._rows_read += 1
        self._last_bad = location

    def add_row(self, row: Row) -> None:
        """Count a well-formed row."""
        self._rows_read += 1
        digest = content_digest(row)
        if digest in self._seen:
            self._duplicates += 1
            self._duplicate_locations += [place(row) or ""][: MAX_LOCATIONS - len(self._duplicate_locations)]
        self._seen.add(digest)
        self._leak += digest in (self.trained_on or ())
        match row:
            case TextRow(label=str(label)) | ImageRow(label=label):
                self._labels[label] += 1
            case TextRow(label=float(number)):
                self._add_number(number)

    def _add_number(self, number: float) -> None:
        self._least = min(self._least, number)
        self._most = max(self._most, number)
        self._number_count += 1
        # Neither the sum nor the difference of huge numbers is finite.
        self._mean += number / self._number_count - self._mean / self._number_count

    def add_length(self, tokens: int) -> None:
        """Count how many tokens a row has; an image has none."""
        if tokens:
            self._lengths[tokens] += 1

    def add_dropped(self) -> None:
        """Count a row that is left out."""
        self._rows_dropped += 1

    def add_usable(self, trained: Example | int, *, truncated: bool) -> None:
        """Count a row as it is trained on."""
        self._rows_usable += 1
        self._rows_truncated += truncated
        if isinstance(trained, Example):
            self._tokens += len(trained.input_ids)
            self._learned_tokens += sum(label != IGNORED for label in trained.labels)
        else:
            self._tokens += trained

    def report(
        self, sha256: str, *, container: Container | None, row_format: RowFormat | None, task: Task | None
    ) -> DatasetReport:
        """All that was counted."""
        return DatasetReport(
            sha256=sha256,
            container=container,
            row_format=row_format,
            task=task,
            trainable=self._rows_usable > 0 and not self._problem_count,
            rows_read=self._rows_read,
            rows_usable=self._rows_usable,
            rows_truncated=self._rows_truncated,
            rows_dropped=self._rows_dropped,
            tokens=self._tokens,
            learned_tokens=self._learned_tokens,
            lengths=_lengths(self._lengths) if self._lengths else None,
            duplicates=Duplicates(count=self._duplicates, locations=tuple(self._duplicate_locations)),
            leak=None if self.trained_on is None else self._leak,
            labels=_listed(self._labels) if self._labels else None,
            label_count=len(self._labels),
            numbers=self._range(),
            problems=tuple(self._problems),
            problem_count=self._problem_count,
            previews=tuple(self.previews),
        )

    def _range(self) -> NumberRange | None:
        if not self._number_count:
            return None
        return NumberRange(min=self._least, max=self._most, mean=self._mean)


def _listed(counted: Counter[str]) -> dict[str, int]:
    listed: Counter[str] = Counter()
    for name, rows in counted.most_common(MAX_LABELS):
        listed[name if len(name) <= MAX_LABEL_CHARACTERS else name[:MAX_LABEL_CHARACTERS] + "..."] += rows
    return dict(listed)


def _lengths(counted: Counter[int]) -> Lengths:
    longest = max(counted)
    edges = [0, _FIRST_EDGE]
    while edges[-1] <= longest:
        edges.append(2 * edges[-1])
    counts = [0] * (len(edges) - 1)
    for tokens, rows in counted.items():
        counts[max(0, tokens.bit_length() - _FIRST_EDGE.bit_length() + 1)] += rows
    return Lengths(
        edges=tuple(edges),
        counts=tuple(counts),
        p50=_percentile(counted, 0.5),
        p95=_percentile(counted, 0.95),
        max=longest,
    )


def _percentile(counted: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the rows does not exceed."""
    left = math.ceil(share * counted.total())
    for tokens, rows in sorted(counted.items()):
        left -= rows
        if left <= 0:
            return tokens
    raise ValueError("no lengths were counted")
