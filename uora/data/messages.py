"""What is wrong with a row of conversation, ``{"messages": [{"role", "content", "weight"?}, ...]}``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from uora.data.formats import Problem
from uora.data.values import kind, shown, text_problems

_ROLES = ("system", "developer", "user", "assistant")
_TOOL_ROLES = ("tool", "function")


def chat_row_problems(row: object) -> Iterator[Problem]:
    """All problems of one parsed line, in the order in which a reader of the line meets them."""
    if not isinstance(row, dict):
        yield Problem("invalid_row", f'found {kind(row)}; expected an object {{"messages": [...]}}.')
        return
    for key in row:
        if key != "messages":
            yield Problem(
                "unknown_key",
                f"the key {shown(key)} is not supported; a row has messages only. Take it out of the row.",
            )
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        found = "no messages" if "messages" not in row else f"messages is {kind(messages)}"
        yield Problem("missing_messages", f"{found}; expected a list with at least one message.")
        return
    for index, message in enumerate(messages):
        yield from _message_problems(message, f"messages[{index}]")
    yield from _training_problems(messages)


def _message_problems(message: object, where: str) -> Iterator[Problem]:
    if not isinstance(message, dict):
        yield Problem("invalid_message", f"{where} is {kind(message)}; expected an object with role and content.")
        return
    for key in message:
        if key not in ("role", "content", "weight"):
            yield Problem(
                "unknown_key",
                f"{where} has the key {shown(key)}, which is not supported; a message has role, content and weight.",
            )
    yield from _role_problems(message.get("role"), where)
    yield from text_problems(message.get("content"), f"the content of {where}")
    if "weight" in message:
        yield from _weight_problems(message, where)


def _role_problems(role: object, where: str) -> Iterator[Problem]:
    if role in _TOOL_ROLES:
        yield Problem("unknown_role", f"{where} has the role {role!r}; training on tool calls is not supported.")
    elif role not in _ROLES:
        yield Problem("unknown_role", f"{where} has the role {shown(role)}; expected one of {', '.join(_ROLES)}.")


def _weight_problems(message: dict[str, Any], where: str) -> Iterator[Problem]:
    weight = message["weight"]
    if type(weight) is not int or weight not in (0, 1):  # True is an int and equals 1, but is no weight
        yield Problem("invalid_weight", f"the weight of {where} is {shown(weight)}; expected 0 or 1.")
    elif message.get("role") != "assistant":
        yield Problem(
            "invalid_weight",
            f"{where} has a weight, but only assistant messages are trained on. Take the weight out.",
        )


def _training_problems(messages: list[Any]) -> Iterator[Problem]:
    answers = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not answers:
        yield Problem("no_assistant_message", "no message has the role assistant, so there is nothing to learn.")
    elif all(answer.get("weight") == 0 for answer in answers):
        yield Problem("no_assistant_message", "every assistant message has weight 0, so there is nothing to learn.")
