"""How much memory the processes of this machine may have."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

#: Of the container, where there is one.
CGROUP = Path("/sys/fs/cgroup")
CGROUP_LIMIT = CGROUP / "memory.max"


def total_bytes(cgroup_limit: Path = CGROUP_LIMIT) -> int:
    """The machine's memory, or what its container is limited to."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        return min(total, int(cgroup_limit.read_text()))
    return total


def available_bytes(cgroup: Path = CGROUP) -> int:
    """What can be taken without pushing anything out, of the machine's memory and of its container's."""
    available = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # there is no container, or none with a limit
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Files that were read count as used, and give way.
        return min(available, limit - used + int(statistics["inactive_file"]))
    return available
