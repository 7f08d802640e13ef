"""A run in a process of its own: ``python -m tests.uora.training.resumable_run FOLDER``.

It reads ``spec.json`` and ``case`` in the folder, keeps its states in ``states``, goes on from the latest of them, and
writes its adapter to ``artifact``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.uora.task_cases import CASES, Recorder
from uora.models import fetch
from uora.spec import TrainingSpec
from uora.training import train


class Folder(Recorder):
    """Keeps states as files, each there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_state(self, step: int, state: bytes) -> None:
        part = self._folder / "part"
        part.write_bytes(state)
        part.rename(self._folder / "states" / f"{step:03d}")


def main(folder: Path) -> None:
    """Start or go on."""
    case = CASES[(folder / "case").read_text()]
    states = sorted((folder / "states").iterdir())
    result = train(
        TrainingSpec.model_validate_json((folder / "spec.json").read_text()),
        base=fetch("tiny", f"path:{folder / 'base'}", cache_dir=folder / "cache"),
        training=case.dataset,
        validation=case.dataset,
        observer=Folder(folder),
        cache_dir=None,
        dtype=torch.float32,
        resume=states[-1].read_bytes() if states else None,
    )
    (folder / "artifact").write_bytes(result.artifact)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
