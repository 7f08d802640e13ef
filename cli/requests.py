"""The body of a job, put together from options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.errors import CliError
from cli.files import upload_file
from cli.output import Json, say

if TYPE_CHECKING:
    from openai import OpenAI


def job_request(
    *,
    model: str,
    training_file: str,
    validation_file: str | None,
    suffix: str | None,
    seed: int | None,
    task: str | None,
    hyperparameters: Json,
    peft: Json,
    metadata: Sequence[str],
    settings: Sequence[str],
) -> Json:
    """What was asked for, and nothing else: the service knows its defaults.

    Args:
        metadata: ``KEY=VALUE``.
        settings: ``KEY=VALUE`` of anything else of the body, see `assign`.

    Raises:
        CliError: one has no ``=``.
    """
    body: Json = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "seed": seed,
        "task": task,
        "peft": _given(peft),
        "metadata": parse_pairs(metadata, option="--metadata"),
    }
    body = {name: value for name, value in body.items() if value not in (None, {})}
    if _given(hyperparameters):
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": _given(hyperparameters)}}
    return assign(body, settings)


def assign(body: Json, settings: Sequence[str]) -> Json:
    """``peft.r=8`` sets ``body["peft"]["r"]``. A value is JSON, or else a text.

    Raises:
        CliError: one is no ``KEY=VALUE``, or leads into what is no object.
    """
    for setting in settings:
        key, value = _split(setting, option="--set")
        *above, name = key.split(".")
        place: Any = body
        for step in above:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise CliError(f"--set {setting}: {step} is a value, which nothing is below.")
        place[name] = _value(value)
    return body


def with_uploaded_files(client: OpenAI, body: Json) -> Json:
    """The body with the ids of files that were named by their paths here, and are uploaded for it."""
    uploaded: dict[str, str] = {}
    for name in ("training_file", "validation_file"):
        given = body.get(name)
        if given is None or not Path(given).is_file():
            continue
        if given not in uploaded:
            uploaded[given] = upload_file(client, Path(given))["id"]
            say(f"{given} is {uploaded[given]}")
        body[name] = uploaded[given]
    return body


def parse_pairs(pairs: Sequence[str], *, option: str) -> dict[str, str]:
    """``KEY=VALUE`` of an option that may be repeated.

    Raises:
        CliError: one has no key, or no ``=``.
    """
    return dict(_split(pair, option=option) for pair in pairs)


def number_or_auto(value: str | None) -> Any:
    """A hyperparameter as the service takes it; it says itself what is wrong with others."""
    return None if value is None else _value(value)


def _given(values: Json) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _split(pair: str, *, option: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise CliError(f"{option} {pair!r}: expected KEY=VALUE.")
    return key, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
