"""What a data set is once it has been read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ChatMessage:
    """One message. ``trained`` is True for an assistant message whose weight is not 0."""

    role: Role
    content: str
    trained: bool = False


@dataclass(frozen=True)
class ChatRow:
    """One conversation; ``line`` is its line in the file, from 1."""

    messages: tuple[ChatMessage, ...]
    line: int


@dataclass(frozen=True)
class CompletionRow:
    """A text and how it goes on."""

    prompt: str
    completion: str
    line: int


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair of texts, with its class or its number."""

    text: str
    text_pair: str | None
    label: str | float
    line: int


@dataclass(frozen=True)
class ImageRow:
    """An image file's bytes with its class."""

    image: bytes
    label: str
    line: int


Row = ChatRow | CompletionRow | TextRow | ImageRow
RowT_co = TypeVar("RowT_co", bound=Row, covariant=True)


@dataclass(frozen=True)
class Dataset(Generic[RowT_co]):
    """A whole file, all rows of one task; ``sha256`` is that of its bytes."""

    rows: tuple[RowT_co, ...]
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Why a row, or the file if ``line`` is None, cannot be trained on. ``code`` is stable."""

    code: str
    message: str
    line: int | None = None
