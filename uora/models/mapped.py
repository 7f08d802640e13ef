"""Copies of base models' weights in the dtype that they are computed in, for later loads to map.

Weights are mostly stored in another dtype (a de-quantised GGUF file's are float32), and converting them makes a private
copy in every process. A file of the very numbers that are computed with is mapped instead: loading reads nothing, and
all processes share its pages.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from uora.folders import scratch_folder
from uora.models.sources import LocalModel, weight_files

logger = logging.getLogger(__name__)


def copy_folder(local: LocalModel, dtype: torch.dtype, *, cache_dir: Path) -> Path:
    """Where the copy is, if there is one: a transformers directory without a tokenizer."""
    return cache_dir / "mapped" / f"{local.digest[:32]}-{str(dtype).removeprefix('torch.')}"


def keep_copy(model: PreTrainedModel, local: LocalModel, *, cache_dir: Path) -> None:
    """Write down the weights of a model that was loaded, unless they are those of its own files, or quantised.

    A copy saves time and memory and is needed for nothing, so what prevents it, a full disk say, is only logged.
    """
    if getattr(model, "hf_quantizer", None) is not None or stored_dtype(local) == model.dtype:
        return
    folder = copy_folder(local, model.dtype, cache_dir=cache_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _write(model, folder)
    except OSError as error:
        logger.warning("no copy of the weights of %s is kept for later loads: %s", local.name, error)


def _write(model: PreTrainedModel, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover)
    with scratch_folder(folder.parent, prefix=f".{folder.name}-") as scratch:
        model.save_pretrained(scratch)
        for file in scratch.iterdir():  # the writer of safetensors keeps them to one user
            file.chmod(0o644)
        scratch.rename(folder)


def stored_dtype(local: LocalModel) -> torch.dtype:
    """The dtype of the first of the model's weights on disk."""
    name, file = next(iter(weight_files(local.directory).items()))
    with safe_open(file, framework="pt") as weights:
        tensor: Tensor = weights.get_tensor(name)
    return tensor.dtype
