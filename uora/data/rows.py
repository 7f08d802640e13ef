"""Rows without problems as values, whatever their format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uora.data.formats import (
    ChatMessage,
    ChatRow,
    CompletionRow,
    ImageRow,
    Record,
    Role,
    Row,
    RowFormat,
    TextRow,
)
from uora.data.images import image_bytes
from uora.data.sharegpt import ROLES


def build_row(record: Record, row_format: RowFormat) -> Row:
    """The row of a record in which `row_problems` finds nothing."""
    assert isinstance(record.value, dict)  # noqa: S101 - as `row_problems` has seen
    return _BUILDERS[row_format](record.value, record.line, record.location)


def _from_messages(row: dict[str, Any], line: int, location: str) -> ChatRow:
    return ChatRow(tuple(_message(message) for message in row["messages"]), line, location)


def _message(message: dict[str, Any]) -> ChatMessage:
    role: Role = "system" if message["role"] == "developer" else message["role"]
    trained = role == "assistant" and message.get("weight", 1) == 1
    return ChatMessage(role, message["content"], trained=trained)


def _from_sharegpt(row: dict[str, Any], line: int, location: str) -> ChatRow:
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    return ChatRow((*_system(row), *(_said(role, text) for role, text in turns)), line, location)


def _from_alpaca(row: dict[str, Any], line: int, location: str) -> ChatRow:
    question = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    return ChatRow((*_system(row), _said("user", question), _said("assistant", row["output"])), line, location)


def _system(row: dict[str, Any]) -> list[ChatMessage]:
    return [_said("system", row["system"])] if row.get("system") else []


def _said(role: Role, content: str) -> ChatMessage:
    return ChatMessage(role, content, trained=role == "assistant")


def _from_prompt(row: dict[str, Any], line: int, location: str) -> CompletionRow:
    return CompletionRow(row["prompt"], row["completion"], line, location)


def _from_text(row: dict[str, Any], line: int, location: str) -> CompletionRow:
    return CompletionRow("", row["text"], line, location)


def _with_class(row: dict[str, Any], line: int, location: str) -> TextRow:
    return TextRow(row["text"], row.get("text_pair"), row["label"], line, location)


def _with_number(row: dict[str, Any], line: int, location: str) -> TextRow:
    return TextRow(row["text"], row.get("text_pair"), float(row["label"]), line, location)


def _image(row: dict[str, Any], line: int, location: str) -> ImageRow:
    return ImageRow(image_bytes(row["image"]), row["label"], line, location)


_BUILDERS: dict[RowFormat, Callable[[dict[str, Any], int, str], Row]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt-completion": _from_prompt,
    "text": _from_text,
    "text-class": _with_class,
    "text-number": _with_number,
    "image-class": _image,
}
