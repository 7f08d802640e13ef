"""How much memory the processes of this machine may have."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

#: Of the container, where there is one.
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def total_bytes(cgroup_limit: Path = CGROUP_LIMIT) -> int:
    """The machine's memory, or what its container is limited to."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        return min(total, int(cgroup_limit.read_text()))
    return total
