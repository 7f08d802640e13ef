"""``files.validate``: check a new job's files, then queue or fail it. ``files.report``: say what is in a file."""

from __future__ import annotations

from worker.context import resources
from worker.reporting import make_report
from worker.validation import validate


def run(job_id: str) -> None:
    """Validate, unless the job has moved on."""
    validate(resources(), job_id)


def report(report_id: str) -> None:
    """Make the report, unless it is there."""
    make_report(resources(), report_id)
