"""A job's measurements as the table that OpenAI's API gives as a result file."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.jobs.models import JobEvent

#: Each column with the names of what it shows, the first that a step has. A classification measures no tokens.
COLUMNS: dict[str, tuple[str, ...]] = {
    "step": ("step",),
    "train_loss": ("train_loss",),
    "train_accuracy": ("train_mean_token_accuracy", "train_accuracy"),
    "valid_loss": ("valid_loss",),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy", "valid_accuracy"),
}


def measurements_csv(session: Session, job_id: str) -> bytes:
    """One line per step that has a metrics event, in order; cells of what was not measured there are empty."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "metrics").order_by(JobEvent.seq)
    steps: dict[int, dict[str, Any]] = defaultdict(dict)
    for event in session.scalars(statement):
        data = event.data or {}
        steps[int(data["step"])] |= data | {"step": int(data["step"])}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in sorted(steps):
        writer.writerow(_cell(steps[step], names) for names in COLUMNS.values())
    return text.getvalue().encode()


def _cell(measured: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((measured[name] for name in names if measured.get(name) is not None), "")
