"""What a data set is once it has been read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ChatMessage:
    """One message. ``trained`` is True for an assistant message whose weight is not 0."""

    role: Role
    content: str
    trained: bool = False


@dataclass(frozen=True)
class ChatRow:
    """One example; ``line`` is its line in the file, from 1."""

    messages: tuple[ChatMessage, ...]
    line: int


@dataclass(frozen=True)
class ChatDataset:
    """A whole file; ``sha256`` is that of its bytes."""

    rows: tuple[ChatRow, ...]
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Why a row, or the file if ``line`` is None, cannot be trained on. ``code`` is stable."""

    code: str
    message: str
    line: int | None = None
