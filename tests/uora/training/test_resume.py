"""A run that is broken and gone on from ends with the bytes of the run that was not."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load, save

from tests.tiny import make_tiny_bert
from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, Recorder
from tests.uora.training.conftest import Run, make_dataset, make_spec
from uora.data import Dataset, Row
from uora.errors import StateError
from uora.models import LocalModel
from uora.spec import TrainingSpec
from uora.training import TrainingResult, TrainingStopped, train

METHODS: dict[str, dict[str, Any]] = {
    "uora": {"tau_quantile": 0.2, "reinit_interval": 1, "count_k": 2},
    "vera": {"r": 8},
    "lora": {"r": 2},
    "olora": {"r": 2},
    "osora": {"r": 4},
}
#: Starts a run, or goes on from a state: ``call(observer=..., resume=...)``.
Call = Callable[..., TrainingResult]


def method_spec(method: str, **changes: Any) -> TrainingSpec:
    """Everything random at once: dropout, shuffled rows over several epochs, accumulation with a remainder."""
    settings = {"n_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02, "dropout": 0.2}
    return make_spec(**{"method": method} | METHODS[method] | settings | changes)


class Stopping(Recorder):
    """Stops after a step."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def should_stop(self) -> bool:
        return bool(self.steps) and self.steps[-1].step >= self._after


def broken(call: Call, stops: list[int]) -> tuple[TrainingResult, list[Recorder]]:
    """A run that is stopped after each of ``stops`` and gone on from the state that it gave away then."""
    recorders: list[Recorder] = []
    state = None
    for after in stops:
        recorders.append(Stopping(after))
        with pytest.raises(TrainingStopped):
            call(observer=recorders[-1], resume=state)
        assert max(recorders[-1].states) == after
        state = recorders[-1].states[after]
    recorders.append(Recorder())
    return call(observer=recorders[-1], resume=state), recorders


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_bit_identical(run: Run, method: str) -> None:
    """Stops after the first step, at the end of an epoch, within one and after the last step, before evaluations."""
    call = partial(run, method_spec(method), make_dataset(11), validation=make_dataset(5))
    unbroken = Recorder()
    expected = call(observer=unbroken)
    assert [evaluation.step for evaluation in unbroken.evaluations] == [3, 6, 9]

    result, recorders = broken(call, [1, 3, 5, 9])

    assert result == expected
    found = [step for recorder in recorders for step in recorder.steps]
    assert [step.step for step in found] == list(range(1, 10))
    for step, reference in zip(found, unbroken.steps, strict=True):
        assert (step.train_loss, step.gradient_norm) == (reference.train_loss, reference.gradient_norm)
        assert (step.learning_rate, step.hits) == (reference.learning_rate, reference.hits)
        assert step.trained_tokens == reference.trained_tokens
    assert [evaluation for recorder in recorders for evaluation in recorder.evaluations] == unbroken.evaluations
    assert (expected.hits > 0) == (method == "uora")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_heads_and_a_models_own_dropout_are_bit_identical(base_of: BaseOf, task: str) -> None:
    case = CASES[task]
    spec = method_spec("uora", r=4).model_copy(update={"task": case.task})
    call = partial(train_here, spec, base_of(make_tiny_bert), case.dataset)
    result, _ = broken(call, [random.Random(task).randrange(1, 15)])
    assert result == call(observer=Recorder(), resume=None)


def train_here(
    spec: TrainingSpec, base: LocalModel, dataset: Dataset[Row], *, observer: Recorder, resume: bytes | None
) -> TrainingResult:
    """A run on the same rows for training and validation."""
    return train(
        spec,
        base=base,
        training=dataset,
        validation=dataset,
        observer=observer,
        cache_dir=None,
        dtype=torch.float32,
        resume=resume,
    )


@pytest.mark.parametrize(("task", "kills"), [("chat", 2), ("classification", 1)])
def test_killed_at_any_moment_and_resumed_is_bit_identical(
    base_of: BaseOf, tmp_path: Path, task: str, kills: int
) -> None:
    case = CASES[task]
    spec = method_spec("uora", save_steps=1, n_epochs=6, r=4).model_copy(update={"task": case.task})
    case.make_base(tmp_path / "base")
    (tmp_path / "states").mkdir()
    (tmp_path / "case").write_text(task)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    chance = random.Random()

    for _ in range(kills):
        kill_after_states(tmp_path, chance.randrange(1, 8), delay=chance.random() * 0.1)
    done = len(list((tmp_path / "states").iterdir()))
    subprocess.run(command(tmp_path), check=True, timeout=120)

    assert done < spec.total_steps(len(case.rows))
    expected = train_here(spec, base_of(case.make_base), case.dataset, observer=Recorder(), resume=None)
    assert (tmp_path / "artifact").read_bytes() == expected.artifact


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.uora.training.resumable_run", str(folder)]


def kill_after_states(folder: Path, number: int, *, delay: float) -> None:
    """Run until so many states more are there, and a moment longer."""
    goal = len(list((folder / "states").iterdir())) + number
    process = subprocess.Popen(command(folder))
    while process.poll() is None and len(list((folder / "states").iterdir())) < goal:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()


def test_states_come_every_few_steps_and_before_evaluations(run: Run) -> None:
    recorder = Recorder()
    run(make_spec(n_epochs=2, batch_size=2, save_steps=4), make_dataset(12), observer=recorder)
    assert list(recorder.states) == [4, 6, 8, 12]


def test_a_stop_during_an_evaluation_repeats_it(run: Run) -> None:
    call = partial(run, make_spec(n_epochs=1, batch_size=8), make_dataset(8), validation=make_dataset(4))
    stopping = Recorder(stop_after=2)  # before the run and after its only step
    with pytest.raises(TrainingStopped):
        call(observer=stopping)
    again = Recorder()
    assert call(observer=again, resume=stopping.states[1]) == call()
    assert (again.steps, len(again.evaluations)) == ([], 1)


def test_early_stopping_remembers_and_may_end_a_resumed_run_at_once(run: Run) -> None:
    """A learning rate too small to change the loss by as much as is asked: no evaluation is better than the first."""
    options: dict[str, Any] = {"early_stopping_patience": 2, "early_stopping_min_delta": 1.0, "eval_steps": 2}
    spec = make_spec(n_epochs=9, batch_size=4, learning_rate=1e-6, **options)
    call = partial(run, spec, make_dataset(8), validation=make_dataset(4))
    expected = call()
    assert (expected.steps, expected.stopped_early) == (6, True)
    result, recorders = broken(call, [3, 6])
    assert result == expected
    assert recorders[-1].steps == []


def test_the_best_adapter_survives(run: Run) -> None:
    """At a rate that soon spoils what the first steps have learned."""
    spec = make_spec(n_epochs=2, batch_size=4, learning_rate=10.0, eval_steps=1, load_best_model_at_end=True)
    call = partial(run, spec, make_dataset(8), validation=make_dataset(4))
    unbroken = Recorder()
    expected = call(observer=unbroken)
    best = min(unbroken.evaluations, key=lambda evaluation: evaluation.metrics["valid_loss"])
    assert expected.best_step == best.step < 3
    assert (expected.artifact, expected.metrics, expected.steps) == (best.artifact, best.metrics, 4)
    result, _ = broken(call, [3])
    assert result == expected


def test_the_clock_goes_on(run: Run) -> None:
    call = partial(run, make_spec(n_epochs=3), make_dataset(8))
    _, (first, second) = broken(call, [5])
    before, after = first.steps[-1], second.steps[-1]
    seconds = [step.trained_tokens / step.tokens_per_second for step in (before, after)]
    assert seconds[1] > seconds[0]


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        ({"learning_rate": 0.01}, 8, r"found spec\.learning_rate 0\.05, expected 0\.01"),
        ({"r": 4}, 8, r"found spec\.adapter\.r 8, expected 4"),
        ({}, 6, r"found training_sha256 'd+', expected 'e+'"),
    ],
)
def test_a_state_of_another_run_is_refused(run: Run, changes: dict[str, Any], rows: int, words: str) -> None:
    recorder = Recorder()
    run(make_spec(n_epochs=1), make_dataset(8), observer=recorder)
    other = make_dataset(rows, sha256=("d" if rows == 8 else "e") * 64)
    with pytest.raises(StateError, match=words) as caught:
        run(make_spec(n_epochs=1, **changes), other, resume=recorder.states[2])
    assert caught.value.code == "invalid_training_state"


def test_damaged_states_are_refused(run: Run) -> None:
    recorder = Recorder()
    result = run(make_spec(n_epochs=1), make_dataset(8), observer=recorder)
    state = recorder.states[2]
    tensors = load(state)
    assert len(tensors) > 2
    for bad in (b"", b"no state", state[:-1], state[: len(state) // 2], result.artifact, save(tensors)):
        with pytest.raises(StateError, match="Expected the state of a training run"):
            run(make_spec(n_epochs=1), make_dataset(8), resume=bad)
