"""Small runs on the tiny Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.uora.task_cases import Recorder
from uora.artifact import Artifact
from uora.data import ChatMessage, ChatRow, Dataset, Row
from uora.models import LocalModel
from uora.spec import Hyperparameters, TrainingOptions, TrainingSpec, UoraSpec, parse_adapter
from uora.training import TrainingResult, train


def make_dataset(n_rows: int, *, sha256: str = "d" * 64) -> Dataset[Row]:
    """Rows of several lengths whose answers can be told from their questions."""
    rows = [
        ChatRow(
            (
                ChatMessage("user", "up " * (1 + i % 5) if i % 2 else "in the " * (1 + i % 3)),
                ChatMessage("assistant", "yes" if i % 2 else "no, not so", trained=True),
            ),
            line=i + 1,
        )
        for i in range(n_rows)
    ]
    return Dataset(tuple(rows), sha256)


def make_spec(**changes: Any) -> TrainingSpec:
    """A spec for a short run; ``changes`` to any of its fields, however deep."""
    adapter = {"r": 8} | {k: v for k, v in changes.items() if k in UoraSpec.model_fields}
    run = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    run |= {k: v for k, v in changes.items() if k in Hyperparameters.model_fields}
    options = {k: v for k, v in changes.items() if k in TrainingOptions.model_fields}
    return TrainingSpec(
        adapter=parse_adapter(adapter),
        hyperparameters=Hyperparameters.model_validate(run),
        options=TrainingOptions.model_validate(options),
        learning_rate=changes.get("learning_rate", 0.05),
        seed=changes.get("seed", 0),
    )


Run = Callable[..., TrainingResult]


@pytest.fixture
def run(tiny_base: LocalModel) -> Run:
    """``train`` on the tiny Llama in float32."""

    def call(
        spec: TrainingSpec,
        training: Dataset[Row],
        *,
        validation: Dataset[Row] | None = None,
        observer: Recorder | None = None,
        dtype: torch.dtype = torch.float32,
        resume: bytes | None = None,
        warm_start: Artifact | None = None,
    ) -> TrainingResult:
        return train(
            spec,
            base=tiny_base,
            training=training,
            validation=validation,
            observer=observer or Recorder(),
            cache_dir=None,
            dtype=dtype,
            resume=resume,
            warm_start=warm_start,
        )

    return call
