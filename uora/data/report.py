"""What there is to know of a data set before it is trained on, as a value that can be stored."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from uora.data.formats import Container, RowFormat
from uora.spec import Task

#: Problems that are kept of a file.
MAX_PROBLEMS = 50
#: Classes that are listed.
MAX_LABELS = 100
#: Characters of a class that are kept; a text in the place of a class can be long.
MAX_LABEL_CHARACTERS = 200
#: Places of duplicates that are kept.
MAX_LOCATIONS = 5
#: Tokens that are shown of a row.
PREVIEW_TOKENS = 2048


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ReportedProblem(_Frozen):
    """Why a row, or the file if there is no location, cannot be trained on."""

    code: str
    message: str
    location: str | None


class Lengths(_Frozen):
    """How many tokens rows have, before any is cut or left out.

    ``counts[i]`` rows have at least ``edges[i]`` and fewer than ``edges[i + 1]`` tokens. Percentiles are by nearest
    rank.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    p50: int
    p95: int
    max: int


class Duplicates(_Frozen):
    """Rows whose content stands earlier in the file; ``locations`` are the first of them."""

    count: int
    locations: tuple[str, ...]


class NumberRange(_Frozen):
    """The numbers of a regression."""

    min: float
    max: float
    mean: float


class Segment(_Frozen):
    """A stretch of a row, all of it learned or none."""

    text: str
    learned: bool


class Preview(_Frozen):
    """A row as the model learns it; of one with more than ``PREVIEW_TOKENS``, the beginning.

    Where tokens are learned, the segments are decoded from the very ids that are trained on. Else they are the row's
    texts, and its class or number is the learned one.
    """

    location: str
    segments: tuple[Segment, ...]
    #: Tokens that follow.
    hidden_tokens: int


class Estimate(_Frozen):
    """What a training would take: all tokens of all epochs, and memory above that of the base model at the peak."""

    tokens: int
    seconds: float | None
    memory_bytes: int | None
    #: Where ``seconds`` and ``memory_bytes`` were measured; another machine takes other seconds.
    machine: str | None = None
    #: In whatever currency the prices are; None where they need seconds that are not known.
    cost: float | None = None


class DatasetReport(_Frozen):
    """What a file is, what is in it and what is wrong with it."""

    sha256: str
    #: None where the file is none that is read.
    container: Container | None
    row_format: RowFormat | None
    task: Task | None
    #: Whether there is no problem and at least one row.
    trainable: bool
    #: Rows that the file has, good or bad.
    rows_read: int
    #: Rows that are trained on.
    rows_usable: int
    #: Of these, rows that are cut.
    rows_truncated: int
    #: Rows without a problem that are left out, since they are too long or cut before they teach anything.
    rows_dropped: int
    #: Of usable rows, as they are cut.
    tokens: int
    #: As the loss counts them; 0 for classes and numbers.
    learned_tokens: int
    lengths: Lengths | None
    duplicates: Duplicates
    #: Rows of a validation file whose content stands in the training file too; None where there is none.
    leak: int | None
    #: Rows of each class, the ``MAX_LABELS`` most frequent; None where rows have no class.
    labels: dict[str, int] | None
    #: How many classes there are.
    label_count: int
    numbers: NumberRange | None
    #: The first ``MAX_PROBLEMS``.
    problems: tuple[ReportedProblem, ...]
    problem_count: int
    previews: tuple[Preview, ...]
    estimate: Estimate | None = None
