"""``maintenance.sweep``, every ``sweep_interval``, and ``maintenance.tidy``, every hour: beat's own tasks."""

from __future__ import annotations

from worker.context import resources
from worker.sweeping import sweep
from worker.tidying import tidy


def run() -> None:
    """Look after jobs that nobody looks after."""
    sweep(resources())


def run_tidy() -> None:
    """Remove bytes that nobody will ask for again."""
    tidy(resources())
