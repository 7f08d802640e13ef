"""``maintenance.sweep``: beat's own task, every ``sweep_interval``."""

from __future__ import annotations

from worker.context import resources
from worker.sweeping import sweep


def run() -> None:
    """Look after jobs that nobody looks after."""
    sweep(resources())
