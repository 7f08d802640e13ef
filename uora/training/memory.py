"""What to say when memory runs out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from uora.errors import OutOfMemory
from uora.models import Batch

#: How torch words it on a CPU.
_CPU_WORDS = ("not enough memory", "can't allocate memory")


@dataclass
class LatestBatch:
    """The size of the batch that went to the model last."""

    rows: int = 0
    tokens: int = 0

    def note(self, batch: Batch) -> None:
        """Another one."""
        self.rows = len(batch["labels"])
        self.tokens = batch["input_ids"].numel() if "input_ids" in batch else 0

    def __str__(self) -> str:
        if not self.rows:
            return "before the first batch"
        tokens = f" with {self.tokens} tokens, padding included" if self.tokens else ""
        return f"at a batch of {self.rows} rows{tokens}"


@contextmanager
def explained_memory_errors(batch: LatestBatch) -> Iterator[None]:
    """Raises:
    OutOfMemory: instead of any of the errors that tell that memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_about_memory(error):
            raise
        raise OutOfMemory(
            f"The training ran out of memory {batch}; at its peak it had {_peak_bytes() / 2**30:.1f} GiB. Lower "
            "batch_size, max_length or r, or set gradient_checkpointing to true."
        ) from error


def _is_about_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _CPU_WORDS)


def _peak_bytes() -> int:
    """Most that this process ever had: of the GPU's memory where there is one, else of the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
