"""What is wrong with a row of each task, without a tokenizer.

| task | row |
|---|---|
| chat | ``{"messages": [{"role", "content", "weight"?}, ...]}`` |
| completion | ``{"prompt", "completion"}`` |
| classification | ``{"text", "text_pair"?, "label": string}`` |
| regression | ``{"text", "text_pair"?, "label": number}`` |
| image-classification | ``{"image": "data:image/png;base64,...", "label": string}`` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from uora.data.formats import Problem
from uora.data.images import from_data_url
from uora.data.messages import chat_row_problems
from uora.data.values import kind, shown, text_problems
from uora.errors import DataError
from uora.spec import Task


def row_problems(row: object, task: Task) -> Iterator[Problem]:
    """All problems of one parsed line, in the order in which a reader of the line meets them."""
    if task == "chat":
        return chat_row_problems(row)
    return _flat_row_problems(row, _FIELDS[task])


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
    return ", ".join(names[:-1]) + " and " + names[-1]


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
    if not isinstance(value, str):
        yield Problem("invalid_image", f"{what} is {kind(value)}; expected a data URL, data:image/png;base64,...")
        return
    try:
        from_data_url(value)
    except DataError as error:
        yield Problem(error.code, f"{what}: {error.message}")


_TEXTS = {"text": _Field(text_problems), "text_pair": _Field(text_problems, required=False)}
_FIELDS: dict[Task, dict[str, _Field]] = {
    "completion": {"prompt": _Field(text_problems), "completion": _Field(text_problems)},
    "classification": {**_TEXTS, "label": _Field(_class_problems)},
    "regression": {**_TEXTS, "label": _Field(_number_problems)},
    "image-classification": {"image": _Field(_image_problems), "label": _Field(_class_problems)},
}
