"""What is wrong with a row ``{"messages": [{"role", "content", "weight"?}, ...]}``, without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from uora.data.formats import Problem

_ROLES = ("system", "developer", "user", "assistant")
_TOOL_ROLES = ("tool", "function")


def row_problems(row: object) -> Iterator[Problem]:
    """All problems of one parsed line, in the order in which a reader of the line meets them."""
    if not isinstance(row, dict):
        yield Problem("invalid_row", f'found {_kind(row)}; expected an object {{"messages": [...]}}.')
        return
    for key in row:
        if key != "messages":
            yield Problem(
                "unknown_key",
                f"the key {_shown(key)} is not supported; a row has messages only. Take it out of the row.",
            )
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        found = "no messages" if "messages" not in row else f"messages is {_kind(messages)}"
        yield Problem("missing_messages", f"{found}; expected a list with at least one message.")
        return
    for index, message in enumerate(messages):
        yield from _message_problems(message, f"messages[{index}]")
    yield from _training_problems(messages)


def _message_problems(message: object, where: str) -> Iterator[Problem]:
    if not isinstance(message, dict):
        yield Problem("invalid_message", f"{where} is {_kind(message)}; expected an object with role and content.")
        return
    for key in message:
        if key not in ("role", "content", "weight"):
            yield Problem(
                "unknown_key",
                f"{where} has the key {_shown(key)}, which is not supported; a message has role, content and weight.",
            )
    yield from _role_problems(message.get("role"), where)
    yield from _content_problems(message.get("content"), where)
    if "weight" in message:
        yield from _weight_problems(message, where)


def _role_problems(role: object, where: str) -> Iterator[Problem]:
    if role in _TOOL_ROLES:
        yield Problem("unknown_role", f"{where} has the role {role!r}; training on tool calls is not supported.")
    elif role not in _ROLES:
        yield Problem("unknown_role", f"{where} has the role {_shown(role)}; expected one of {', '.join(_ROLES)}.")


def _content_problems(content: object, where: str) -> Iterator[Problem]:
    if not isinstance(content, str):
        yield Problem("invalid_content", f"the content of {where} is {_kind(content)}; expected a string.")
    elif not content:
        yield Problem("invalid_content", f"the content of {where} is empty; expected text.")
    elif not _is_encodable(content):
        yield Problem(
            "invalid_encoding",
            f"the content of {where} has half of a surrogate pair (a \\ud800..\\udfff escape on its own), "
            "which is no character. Write the whole pair, or the character itself in UTF-8.",
        )


def _weight_problems(message: dict[str, Any], where: str) -> Iterator[Problem]:
    weight = message["weight"]
    if type(weight) is not int or weight not in (0, 1):  # True is an int and equals 1, but is no weight
        yield Problem("invalid_weight", f"the weight of {where} is {_shown(weight)}; expected 0 or 1.")
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


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    """What JSON calls it."""
    match value:
        case None:
            return "null or missing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case _:
            return "an object"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
