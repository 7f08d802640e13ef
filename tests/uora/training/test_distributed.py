"""Two processes train what one would."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_tiny_bert, make_tiny_llama
from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, Recorder, Trained
from tests.uora.task_cases import run as run_case
from tests.uora.training.conftest import make_spec
from tests.uora.training.distributed_run import N_ROWS
from uora.artifact import loads
from uora.errors import SpecError
from uora.models import LocalModel, load_model
from uora.spec import TrainingSpec
from uora.training import train


def make_still_bert(directory: Path) -> Path:
    """Without dropout: processes cannot draw the masks that one would."""
    return make_tiny_bert(directory, dropout=0.0)


def prepare(folder: Path, spec: TrainingSpec, case: str, make_base: Callable[[Path], Path], *, stop_after: int) -> None:
    make_base(folder / "base")
    (folder / "spec.json").write_text(spec.model_dump_json())
    (folder / "case").write_text(case)
    (folder / "stop_after").write_text(str(stop_after))


def launch(*folders: Path) -> None:
    """Runs of two processes, one after the other."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["tests.uora.training.distributed_run", *map(str, folders)]
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    subprocess.run([sys.executable, "-m", *launcher, "-m", *module], env=environment, check=True, timeout=300)


def told(folder: Path) -> list[dict[str, Any]]:
    """What each process's observer was told."""
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


def alone(spec: TrainingSpec, case: str, base_of: BaseOf, make_base: Callable[[Path], Path]) -> Trained:
    """The same run in this process."""
    return run_case(spec, base_of(make_base), dataclasses.replace(CASES[case], rows=CASES[case].rows[:N_ROWS]))


def assert_close(found: bytes, expected: Trained) -> None:
    tensors, references = loads(found).tensors, expected.artifact.tensors
    assert tensors.keys() == references.keys()
    for name, tensor in references.items():
        np.testing.assert_allclose(tensors[name], tensor, atol=1e-4 if name != "hits" else 0, err_msg=name)


@dataclass(frozen=True)
class Twofold:
    """A run of two processes: of which case, on which base model, and in halves of it or not."""

    case: str
    make_base: Callable[[Path], Path]
    halves: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        return "-".join([self.case, *(name for name in ("halves", "recompute") if getattr(self, name))])

    @property
    def spec(self) -> TrainingSpec:
        changes = {"tau_quantile": 0.2, "reinit_interval": 1, "count_k": 2, "gradient_checkpointing": self.recompute}
        spec = make_spec(r=4, batch_size=4, gradient_accumulation_steps=2, n_epochs=2, **changes)
        return spec.model_copy(update={"task": CASES[self.case].task})


RUNS = [
    Twofold("chat", make_tiny_llama),
    Twofold("regression", make_still_bert),
    Twofold("chat", make_tiny_llama, halves=True),
    Twofold("chat", make_tiny_llama, halves=True, recompute=True),
    Twofold("regression", make_still_bert, halves=True),
]


@pytest.fixture(scope="module")
def twofold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all runs, made by the same two processes, which take seconds to start."""
    folders = {str(run): tmp_path_factory.mktemp(str(run)) for run in RUNS}
    for run in RUNS:
        prepare(folders[str(run)], run.spec, run.case, run.make_base, stop_after=10**6)
        if run.halves:  # tokens at once: the processes have different numbers of pieces
            (folders[str(run)] / "shard").write_text("24")
    launch(*folders.values())
    return folders


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_two_processes_train_what_one_would(base_of: BaseOf, twofold: dict[str, Path], run: Twofold) -> None:
    folder = twofold[str(run)]
    first, second = told(folder)
    one = alone(run.spec, run.case, base_of, run.make_base)

    assert second == {"stopped": False, "steps": [], "evaluations": [], "states": []}
    assert (folder / "artifact-0").read_bytes() == (folder / "artifact-1").read_bytes()
    assert_close((folder / "artifact-0").read_bytes(), one)
    assert len(first["steps"]) == 6
    for step, reference in zip(first["steps"], one.recorder.steps, strict=True):
        assert step[:2] == pytest.approx([reference.train_loss, reference.gradient_norm], rel=1e-3)
        assert step[2:] == [reference.hits, reference.trained_tokens]
    for metrics, evaluation in zip(first["evaluations"], one.recorder.evaluations, strict=True):
        assert metrics == pytest.approx(evaluation.metrics, rel=1e-3)
    whole = load_model(one.base, dtype=torch.float32, device="cpu", task=run.spec.task)
    frozen = sum(weight.nbytes for weight in whole.parameters() if not weight.requires_grad)
    for rank in range(2):
        held = int((folder / f"frozen-{rank}").read_text())
        assert held == pytest.approx(frozen / (2 if run.halves else 1), rel=0.05)


def test_a_process_alone_shards_nothing(tiny_base: LocalModel) -> None:
    data = CASES["chat"].dataset
    with pytest.raises(SpecError, match=r"found one process.*torchrun"):
        train(
            make_spec(),
            base=tiny_base,
            training=data,
            validation=None,
            observer=Recorder(),
            cache_dir=None,
            dtype=torch.float32,
            shard=True,
        )


def test_the_first_process_stops_both_and_both_go_on(base_of: BaseOf, tmp_path: Path) -> None:
    """The first time with halves of the base model; whole ones are paused in tests/worker/test_ranks.py."""
    spec = make_spec(r=4, batch_size=4, n_epochs=2)
    (tmp_path / "shard").write_text("1024")
    prepare(tmp_path, spec, "chat", make_tiny_llama, stop_after=7)  # before the run, after five steps, in an evaluation
    launch(tmp_path)
    first, second = told(tmp_path)
    assert (first["stopped"], second["stopped"]) == (True, True)
    assert (len(first["steps"]), first["states"]) == (6, [5, 6])

    (tmp_path / "state-0").rename(tmp_path / "resume")
    (tmp_path / "stop_after").write_text(str(10**6))
    (tmp_path / "shard").unlink()  # a state is whole, whoever made it
    launch(tmp_path)
    again, _ = told(tmp_path)

    one = alone(spec, "chat", base_of, make_tiny_llama)
    assert len(first["steps"]) + len(again["steps"]) == len(one.recorder.steps)
    assert_close((tmp_path / "artifact-0").read_bytes(), one)
