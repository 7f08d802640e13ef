"""Runs of several processes: ``torchrun ... -m tests.uora.training.distributed_run FOLDER ...``.

The folder of a run has a tiny base model in ``base``, ``spec.json``, the name of a ``case``, after how many questions
to stop in ``stop_after``, maybe a state in ``resume``, and maybe how many tokens go through the model at once in
``shard``, for a sharded run. Each process writes what its observer was told, its last state and its adapter to files of
its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from tests.uora.task_cases import CASES, Recorder
from uora.data import Dataset
from uora.models import fetch
from uora.spec import TrainingSpec
from uora.training import TrainingStopped, train, trainer
from uora.training.batches import MAX_TOKENS_AT_ONCE

#: With batches of 4, the last one of an epoch has a row for the first process alone.
N_ROWS = 17


def main(folder: Path) -> None:
    """Train on the case's rows, and evaluate on them."""
    case = CASES[(folder / "case").read_text()]
    rank = os.environ["RANK"]
    stop_after = int((folder / "stop_after").read_text())
    resume = folder / "resume"
    shard = folder / "shard"
    tokens_at_once = int(shard.read_text()) if shard.exists() else MAX_TOKENS_AT_ONCE["cpu"]
    data = Dataset(case.rows[:N_ROWS], "d" * 64)
    recorder = Recorder(stop_after=stop_after if rank == "0" else None)
    stopped = False
    try:
        with (
            patch.dict(MAX_TOKENS_AT_ONCE, cpu=tokens_at_once),
            patch.object(trainer, "train_run", wraps=trainer.train_run) as train_run,
        ):
            result = train(
                TrainingSpec.model_validate_json((folder / "spec.json").read_text()),
                base=fetch("tiny", f"path:{folder / 'base'}", cache_dir=folder / f"cache-{rank}"),
                training=data,
                validation=data,
                observer=recorder,
                cache_dir=None,
                dtype=torch.float32,
                resume=resume.read_bytes() if resume.exists() else None,
                shard=shard.exists(),
            )
        (folder / f"frozen-{rank}").write_text(str(frozen_bytes(train_run.call_args.args[0].model)))
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


def frozen_bytes(model: nn.Module) -> int:
    """What this process holds of the weights that are not trained."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in frozen]
    return sum(weight.untyped_storage().nbytes() for weight in held)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
    distributed.destroy_process_group()
    # As a job's own process ends: torch's threads have been seen to abort a process that took itself down in order.
    sys.stdout.flush()
    os._exit(0)
