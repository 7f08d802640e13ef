"""Files of arrays that can be made again: written whole or not at all, read without trust. Free of torch."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Array = NDArray[Any]


def read(path: Path) -> dict[str, Array] | None:
    """The arrays of a file; None if there is none or if it is damaged, since it can be made again."""
    try:
        with safe_open(path, framework="numpy") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            expected = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return arrays if expected == _digest(arrays) else None


def write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Store arrays, contiguous ones; another process may read or write the same file at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(dict(arrays), temporary, metadata={"sha256": _digest(arrays)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
