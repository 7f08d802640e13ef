"""Starting a run from an adapter that has been trained before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel

from uora.artifact import Artifact, Manifest
from uora.errors import SpecError
from uora.methods import adapted_layers, restore_artifact
from uora.models import LocalModel
from uora.spec import TrainingSpec
from uora.svd import BaseWeights
from uora.training.tasks import TrainingTask

#: Settings of methods that only say how training goes on. All others say what the stored numbers mean. ``targets`` is
#: compared as the modules that it names.
_FREE = {"dropout", "tau", "tau_quantile", "reinit_interval", "d_initial", "targets"}


def start_from(
    model: PeftModel,
    artifact: Artifact,
    *,
    spec: TrainingSpec,
    task: TrainingTask,
    base: LocalModel,
    weights: BaseWeights,
) -> None:
    """Write a stored adapter's vectors, hits and head over the start of a run.

    UORA's counts are no part of a stored adapter, so with ``count_k`` above 1 they begin at zero.

    Args:
        model: with the run's new adapter on it.
        artifact: the adapter to start from.
        spec: the run.
        task: its task.
        base: its base model.
        weights: the base model's own weights.

    Raises:
        SpecError: the adapter is of another base model, or of another kind than the run's.
        FingerprintError: the frames or singular vectors built here are not those it was trained on.
    """
    for name, found, expected in _differences(artifact.manifest, model, spec=spec, task=task, base=base):
        raise SpecError(
            f"The adapter to start from has {name} {found!r}, expected {expected!r} as in this run. Give an adapter of "
            "the same kind or change the run.",
            param=name,
        )
    restore_artifact(model, artifact, base=weights)
    task.take_stored(model)


def _differences(
    manifest: Manifest, model: PeftModel, *, spec: TrainingSpec, task: TrainingTask, base: LocalModel
) -> Iterator[tuple[str, Any, Any]]:
    """What of an adapter does not fit a run: names, what was found, what was expected."""
    found: dict[str, Any] = {"base_digest": manifest.base_digest, "task": manifest.task, "labels": manifest.labels}
    expected: dict[str, Any] = {"base_digest": base.digest, "task": spec.task, "labels": task.labels}
    found |= manifest.adapter.model_dump(exclude=_FREE) | {"modules": [module.name for module in manifest.modules]}
    expected |= spec.adapter.model_dump(exclude=_FREE) | {"modules": list(adapted_layers(model))}
    for name, value in expected.items():
        if found.get(name) != value:
            yield name, found.get(name), value
