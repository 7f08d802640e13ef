"""A run of several processes: ``python -m torch.distributed.run ... -m tests.uora.training.distributed_run FOLDER``.

The folder has a tiny base model in ``base``, ``spec.json``, the name of a ``case``, after how many questions to stop in
``stop_after`` and maybe a state in ``resume``. Each process writes what its observer was told, its last state and its
adapter to files of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from tests.uora.task_cases import CASES, Recorder
from uora.data import Dataset
from uora.models import fetch
from uora.spec import TrainingSpec
from uora.training import TrainingStopped, train

#: With batches of 4, the last one of an epoch has a row for the first process alone.
N_ROWS = 17


def main(folder: Path) -> None:
    """Train on the case's rows, and evaluate on them."""
    case = CASES[(folder / "case").read_text()]
    rank = os.environ["RANK"]
    stop_after = int((folder / "stop_after").read_text())
    resume = folder / "resume"
    data = Dataset(case.rows[:N_ROWS], "d" * 64)
    recorder = Recorder(stop_after=stop_after if rank == "0" else None)
    stopped = False
    try:
        result = train(
            TrainingSpec.model_validate_json((folder / "spec.json").read_text()),
            base=fetch("tiny", f"path:{folder / 'base'}", cache_dir=folder / f"cache-{rank}"),
            training=data,
            validation=data,
            observer=recorder,
            cache_dir=None,
            dtype=torch.float32,
            resume=resume.read_bytes() if resume.exists() else None,
        )
        (folder / f"artifact-{rank}").write_bytes(result.artifact)
    except TrainingStopped:
        stopped = True
    for state in recorder.states.values():
        (folder / f"state-{rank}").write_bytes(state)
    told = {
        "stopped": stopped,
        "steps": [[step.train_loss, step.gradient_norm, step.hits, step.trained_tokens] for step in recorder.steps],
        "evaluations": [evaluation.metrics for evaluation in recorder.evaluations],
        "states": list(recorder.states),
    }
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    distributed.barrier()  # none leaves while another still talks to it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
