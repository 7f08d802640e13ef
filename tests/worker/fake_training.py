"""``python -m worker.child`` with a training that takes no torch: what it learns is a number that every step changes.

The number after the last step tells whether a run that was broken is the same as one that was not.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.worker.artifacts import make_artifact
from uora.artifact import Artifact, dumps, loads
from uora.spec import TrainingSpec

#: For ``worker.child_process.COMMAND``.
COMMAND = (sys.executable, "-P", "-m", "tests.worker.fake_training")
STEP_SECONDS = 0.05
EVALUATED_EVERY = 8


def artifact_of(number: float) -> bytes:
    """The adapter that has learned ``number``."""
    artifact = loads(make_artifact())
    return dumps(Artifact(artifact.manifest, {**artifact.tensors, "d": np.full((1, 2), number, np.float32)}))


def number_of(artifact: Artifact) -> float:
    """What an adapter has learned."""
    return float(artifact.tensors["d"][0, 0])


def learn(number: float, step: int) -> float:
    """One step."""
    return float(np.float32(number * 0.9 + step))


def learned(steps: int, *, start: float = 0.1) -> float:
    """The number after a whole run."""
    number = start
    for step in range(1, steps + 1):
        number = learn(number, step)
    return number


def train(
    spec: TrainingSpec, *, training: Any, observer: Any, resume: bytes | None, warm_start: Artifact | None, **_: Any
) -> Any:
    """As ``uora.training.train``."""
    steps = _steps(Member(spec, training, None, observer, resume, warm_start))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@dataclass(frozen=True)
class Member:
    """As in ``uora.training.cotraining``."""

    spec: TrainingSpec
    training: Any
    validation: Any
    observer: Any
    resume: bytes | None = None
    warm_start: Artifact | None = None


def cotrain(members: Sequence[Member], *, ended: Callable[[int, Any], None], **_: Any) -> None:
    """As in ``uora.training.cotraining``: a step of each in turn."""
    runs = {number: _steps(member) for number, member in enumerate(members)}
    while runs:
        for number, steps in tuple(runs.items()):
            try:
                next(steps)
            except StopIteration as end:
                ended(number, end.value)
                del runs[number]
            except Exception as error:
                ended(number, error)
                del runs[number]


def _steps(member: Member) -> Generator[None, None, Any]:
    """A run, which waits after each of its steps; its value is the result."""
    spec, observer = member.spec, member.observer
    observing = sys.modules["uora.training"]
    total = spec.total_steps(len(member.training.rows))
    step, number = 0, number_of(member.warm_start) if member.warm_start else 0.1
    if member.resume is not None:
        step, number = json.loads(member.resume)
    observer.on_start(total)
    while step < total:
        _stop_if_asked(observer, step, number)
        time.sleep(STEP_SECONDS)
        step += 1
        number = learn(number, step)
        observer.on_step(_metrics(step, total))
        if step % spec.options.save_steps == 0:
            observer.on_state(step, json.dumps([step, number]).encode())
        if step % EVALUATED_EVERY == 0 or step == total:
            metrics = {"step": float(step), "train_loss": 1 / step, "valid_loss": 2 / step}
            observer.on_evaluation(observing.Evaluation(step, metrics, artifact_of(number)))
        yield
    return observing.TrainingResult(artifact_of(number), trained_tokens=step, steps=step, hits=0, metrics={})


def _stop_if_asked(observer: Any, step: int, number: float) -> None:
    if observer.should_stop():
        observer.on_state(step, json.dumps([step, number]).encode())
        raise sys.modules["uora.training"].TrainingStopped


def _metrics(step: int, total: int) -> Any:
    return sys.modules["uora.training"].StepMetrics(
        step=step,
        total_steps=total,
        train_loss=1 / step,
        train_mean_token_accuracy=0.5,
        learning_rate=0.01,
        gradient_norm=1.5,
        tokens_per_second=10.0,
        seconds_left=1.0,
        hits=0,
        trained_tokens=step,
    )


def install() -> None:
    """Put this in the place of what loads torch."""
    observer = Path(__file__).parents[2] / "uora" / "training" / "observer.py"
    spec = importlib.util.spec_from_file_location("uora.training", observer)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["uora.training"] = module
    spec.loader.exec_module(module)
    module.train = train  # type: ignore[attr-defined]
    together: dict[str, Any] = {"Member": Member, "cotrain": cotrain}
    sys.modules["uora.training.cotraining"] = types.SimpleNamespace(**together)  # type: ignore[assignment]
    nothing: dict[str, Any] = {"set_num_threads": lambda _: None}
    sys.modules["torch"] = types.SimpleNamespace(**nothing)  # type: ignore[assignment]
    models: dict[str, Any] = {"fetch": lambda *_, **__: None, "pick_dtype": lambda _: None}
    sys.modules["uora.models"] = types.SimpleNamespace(**models)  # type: ignore[assignment]


if __name__ == "__main__":
    install()
    from worker import child

    child.run_and_exit()
