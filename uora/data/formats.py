"""What a data set is once it has been read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Role = Literal["system", "user", "assistant"]
#: How a file holds its rows.
Container = Literal["jsonl", "json", "csv", "parquet", "zip"]
#: What a row looks like in the file (see ``uora.data.validation``).
RowFormat = Literal[
    "messages", "sharegpt", "alpaca", "prompt-completion", "text", "text-class", "text-number", "image-class"
]


@dataclass(frozen=True)
class ChatMessage:
    """One message. ``trained`` is True for an assistant message whose weight is not 0."""

    role: Role
    content: str
    trained: bool = False


@dataclass(frozen=True)
class ChatRow:
    """One conversation.

    ``line`` is its line in the file, or its number where the file has no lines, from 1; ``location`` is the same in
    words, None for ``Line {line}``.
    """

    messages: tuple[ChatMessage, ...]
    line: int
    location: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class CompletionRow:
    """A text and how it goes on; the prompt is empty where the whole text is learned."""

    prompt: str
    completion: str
    line: int
    location: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair of texts, with its class or its number."""

    text: str
    text_pair: str | None
    label: str | float
    line: int
    location: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ImageRow:
    """An image file's bytes with its class."""

    image: bytes
    label: str
    line: int
    location: str | None = field(default=None, compare=False)


Row = ChatRow | CompletionRow | TextRow | ImageRow
RowT_co = TypeVar("RowT_co", bound=Row, covariant=True)


@dataclass(frozen=True)
class Dataset(Generic[RowT_co]):
    """A whole file, all rows of one task; ``sha256`` is that of its bytes."""

    rows: tuple[RowT_co, ...]
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Why a row, or the file if it has no place, cannot be trained on. ``code`` is stable; places are those of rows."""

    code: str
    message: str
    line: int | None = None
    location: str | None = None


@dataclass(frozen=True)
class Record:
    """What a file holds in the place of a row: a value as JSON has them, or bytes; nobody has judged it yet."""

    value: object
    line: int
    location: str


def place(found: Row | Problem) -> str | None:
    """Where a row or a problem is, in words; None for the whole file."""
    return found.location or (f"Line {found.line}" if found.line else None)
