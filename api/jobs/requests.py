"""The request that a job was made of, and requests made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from api.jobs.models import Job
from api.jobs.schemas import JobCreate


def request_of(job: Job) -> dict[str, Any]:
    """A body that makes the same job again: its seed and everything else that is settled at its creation is named."""
    return {
        "model": job.model,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "suffix": job.suffix,
        "seed": job.seed,
        "metadata": job.labels,
        "method": {"type": "supervised", "supervised": {"hyperparameters": job.hyperparameters}},
        "peft": {**job.adapter, "learning_rate": job.learning_rate},
        "training": job.options,
        "task": job.task,
        "integrations": job.integrations,
    }


def changed_request(job: Job, changes: Mapping[str, Any]) -> JobCreate:
    """The job's request with a JSON merge patch (RFC 7396) applied: null takes a value back to its default.

    Settings of one method say nothing to another: with another ``peft.method``, all of ``peft`` is what the patch says.

    Raises:
        RequestValidationError: it is no request of a job any more.
    """
    request = request_of(job)
    peft = changes.get("peft")
    if isinstance(peft, Mapping) and peft.get("method", request["peft"]["method"]) != request["peft"]["method"]:
        request["peft"] = {}
    body = merge_patch(request, changes)
    try:
        return JobCreate.model_validate(body)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(errors, body=body) from error


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``"""
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        name: found
        for key, below in value.items()
        for name, found in flatten(below, f"{path}.{key}" if path else str(key)).items()
    }
