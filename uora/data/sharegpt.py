"""What is wrong with a row of ShareGPT, ``{"conversations": [{"from", "value"}, ...], "system"?, "id"?}``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from uora.data.formats import Problem, Role
from uora.data.values import kind, shown, text_problems

#: What the speakers are called elsewhere.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TOOL_SPEAKERS = ("function_call", "observation", "tool", "function")
_KEYS = ("conversations", "system", "id")


def sharegpt_row_problems(row: dict[str, Any]) -> Iterator[Problem]:
    """All problems of one row, in the order in which its reader meets them."""
    for key in row:
        if key not in _KEYS:
            yield Problem("unknown_key", f"the key {shown(key)} is not supported; a row has {', '.join(_KEYS)}.")
    if "system" in row and row["system"] != "":
        yield from text_problems(row["system"], "system")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        message = f"conversations is {kind(turns)}; expected a list with at least one turn."
        yield Problem("missing_messages", message)
        return
    for index, turn in enumerate(turns):
        yield from _turn_problems(turn, f"conversations[{index}]")
    if not any(isinstance(turn, dict) and turn.get("from") in ("gpt", "assistant") for turn in turns):
        yield Problem("no_assistant_message", "no turn is from gpt, so there is nothing to learn.")


def _turn_problems(turn: object, where: str) -> Iterator[Problem]:
    if not isinstance(turn, dict):
        yield Problem("invalid_message", f"{where} is {kind(turn)}; expected an object with from and value.")
        return
    for key in turn:
        if key not in ("from", "value"):
            message = f"{where} has the key {shown(key)}, which is not supported; a turn has from and value."
            yield Problem("unknown_key", message)
    yield from _speaker_problems(turn.get("from"), where)
    yield from text_problems(turn.get("value"), f"the value of {where}")


def _speaker_problems(speaker: object, where: str) -> Iterator[Problem]:
    if speaker in _TOOL_SPEAKERS:
        yield Problem("unknown_role", f"{where} is from {speaker!r}; training on tool calls is not supported.")
    elif not isinstance(speaker, str) or speaker not in ROLES:
        yield Problem("unknown_role", f"{where} is from {shown(speaker)}; expected one of {', '.join(ROLES)}.")
