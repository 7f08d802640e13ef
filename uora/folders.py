"""Folders that appear only when they are complete."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uora.errors import ExportError


@contextmanager
def scratch_folder(parent: Path, *, prefix: str) -> Iterator[Path]:
    """A new folder that is gone at the end unless it was renamed."""
    path = parent / f"{prefix}{uuid.uuid4().hex}"  # not mkdtemp: what it makes, only one user can read
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``target`` at the end unless something is raised.

    Raises:
        ExportError: ``target`` is there already, and not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target} is there already and not empty. Name a new directory, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, prefix=f".{target.name}-") as scratch:
        yield scratch
        for file in scratch.iterdir():  # the writer of safetensors keeps them to one user
            file.chmod(0o644)
        scratch.rename(target)
