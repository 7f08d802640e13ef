"""What is wrong with a row of each format, without a tokenizer.

| task | format | row |
|---|---|---|
| chat | messages | ``{"messages": [{"role", "content", "weight"?}, ...]}`` |
| | sharegpt | ``{"conversations": [{"from": "human", "gpt" or "system", "value"}, ...], "system"?, "id"?}`` |
| | alpaca | ``{"instruction", "input"?, "output", "system"?}`` |
| completion | prompt-completion | ``{"prompt", "completion"}`` |
| | text | ``{"text"}``, all of it learned |
| classification | text-class | ``{"text", "text_pair"?, "label": string}`` |
| regression | text-number | ``{"text", "text_pair"?, "label": number}`` |
| image-classification | image-class | ``{"image": "data:image/png;base64,...", "label": string}``, or bytes |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from uora.data.formats import Problem, RowFormat
from uora.data.images import image_bytes
from uora.data.messages import chat_row_problems
from uora.data.sharegpt import sharegpt_row_problems
from uora.data.values import kind, shown, text_problems
from uora.errors import DataError


def row_problems(row: object, row_format: RowFormat) -> Iterator[Problem]:
    """All problems of what stands in a row's place, in the order in which its reader meets them."""
    match row_format:
        case "messages":
            return chat_row_problems(row)
        case "sharegpt" if isinstance(row, dict):
            return sharegpt_row_problems(row)
        case "sharegpt":
            return iter([Problem("invalid_row", f'found {kind(row)}; expected an object {{"conversations": [...]}}.')])
        case _:
            return _flat_row_problems(row, _FIELDS[row_format])


@dataclass(frozen=True)
class _Field:
    problems: Callable[[object, str], Iterator[Problem]]
    required: bool = True


def _flat_row_problems(row: object, fields: Mapping[str, _Field]) -> Iterator[Problem]:
    if not isinstance(row, dict):
        yield Problem("invalid_row", f"found {kind(row)}; expected an object with {_listed(fields)}.")
        return
    for key in row:
        if key not in fields:
            yield Problem("unknown_key", f"the key {shown(key)} is not supported; a row has {_listed(fields)}.")
    for name, field in fields.items():
        if name in row:
            yield from field.problems(row[name], name)
        elif field.required:
            yield Problem("missing_field", f"{name} is missing; a row has {_listed(fields)}.")


def _listed(fields: Mapping[str, _Field]) -> str:
    names = [name if field.required else f"optionally {name}" for name, field in fields.items()]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _class_problems(value: object, what: str) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield Problem("invalid_label", f"{what} is {kind(value)}; expected the name of a class, a string.")
    else:
        yield from text_problems(value, what)


def _number_problems(value: object, what: str) -> Iterator[Problem]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        yield Problem("invalid_label", f"{what} is {kind(value)}; expected a number.")
    elif not _is_finite(value):
        yield Problem("invalid_label", f"{what} is {shown(value)}; expected a finite number.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _image_problems(value: object, what: str) -> Iterator[Problem]:
    try:
        image_bytes(value)
    except DataError as error:
        yield Problem(error.code, f"{what}: {error.message}")


def _optional_text_problems(value: object, what: str) -> Iterator[Problem]:
    if value != "":
        yield from text_problems(value, what)


_TEXT = _Field(text_problems)
_MAYBE_EMPTY = _Field(_optional_text_problems, required=False)
_TEXTS = {"text": _TEXT, "text_pair": _Field(text_problems, required=False)}
_FIELDS: dict[RowFormat, dict[str, _Field]] = {
    "alpaca": {"instruction": _TEXT, "input": _MAYBE_EMPTY, "output": _TEXT, "system": _MAYBE_EMPTY},
    "prompt-completion": {"prompt": _TEXT, "completion": _TEXT},
    "text": {"text": _TEXT},
    "text-class": {**_TEXTS, "label": _Field(_class_problems)},
    "text-number": {**_TEXTS, "label": _Field(_number_problems)},
    "image-class": {"image": _Field(_image_problems), "label": _Field(_class_problems)},
}
