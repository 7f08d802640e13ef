"""``files.validate``: check a new job's files, then queue or fail it."""

from __future__ import annotations

from worker.context import resources
from worker.validation import validate


def run(job_id: str) -> None:
    """Validate, unless the job has moved on."""
    validate(resources(), job_id)
