"""Estimates on the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class EstimateError(BaseModel):
    """Why a job of this request would fail, or why nothing can be said yet."""

    code: str
    message: str
    param: str | None = None


class EstimatedFile(BaseModel):
    """What a file comes to for the model."""

    file: str
    rows: int
    tokens: int
    learned_tokens: int
    problem_count: int


class JobEstimate(BaseModel):
    """What a job of the same request would take. Numbers are null until ``status`` is ``completed``, and where the
    job would fail."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    #: in_progress, completed or failed.
    status: str
    model: str
    #: Whether the files can be trained on; null until that is known.
    trainable: bool | None = None
    error: EstimateError | None = None
    training: EstimatedFile | None = None
    validation: EstimatedFile | None = None
    #: As they would be run: no "auto" is left.
    hyperparameters: dict[str, Any] | None = None
    learning_rate: float | None = None
    #: The method and its settings.
    adapter: dict[str, Any] | None = None
    steps: int | None = None
    #: Of all epochs; ``trained_tokens`` counts the learned ones among them.
    tokens: int | None = None
    seconds: float | None = None
    #: At the peak, above that of the loaded base model.
    memory_bytes: int | None = None
    #: Where seconds and memory were measured; another machine takes other seconds.
    machine: str | None = None
    trainable_parameters: int | None = None
    adapter_bytes: int | None = None
    cost: float | None = None
