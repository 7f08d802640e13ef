"""Fine-tuning jobs, their events and checkpoints. The row is the truth; the queue only rings."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class JobStatus(StrEnum):
    """OpenAI's job states."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: Every move a job may make; running -> queued is a job whose trainer was lost or shut down.
MOVES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
ENDED = frozenset(status for status, moves in MOVES.items() if not moves)


class Job(Base, Listed):
    """One fine-tuning job.

    ``attempt`` is the fencing number: each claim raises it, and a worker's writes count only while it is still
    theirs.
    """

    __tablename__ = "jobs"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    status: Mapped[str] = mapped_column(default=JobStatus.VALIDATING_FILES, index=True)
    #: Base model.
    model: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    #: ``metadata`` of the request (the attribute name is taken by SQLAlchemy).
    labels: Mapped[dict[str, Any] | None]
    #: ``uora.spec.HyperparameterRequest`` as sent.
    hyperparameters: Mapped[dict[str, Any]]
    #: ``uora.spec.AdapterSpec``.
    adapter: Mapped[dict[str, Any]]
    #: Absolute peak learning rate asked for in ``peft``; None for the default.
    learning_rate: Mapped[float | None]
    #: ``uora.spec.TrainingSpec`` once the rows were counted.
    training_spec: Mapped[dict[str, Any] | None]
    #: {"step", "total_steps", "train_loss", "tokens_per_second", "seconds_left", "hits"} while running.
    progress: Mapped[dict[str, Any] | None]
    #: {"code", "message", "param"} when failed.
    error: Mapped[dict[str, Any] | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    estimated_finish: Mapped[datetime | None]

    cancel_requested: Mapped[bool] = mapped_column(default=False)
    attempt: Mapped[int] = mapped_column(default=0)
    #: Attempts that ended with a trainer that vanished; an orderly shutdown does not count.
    lost_trainers: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]


class JobEvent(Base, Listed):
    """A line of a job's log (type ``message``) or a measurement (type ``metrics``)."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class Checkpoint(Base, Listed):
    """Metrics of one evaluation; its adapter answers under the name ``model_name``."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step_number: Mapped[int]
    model_name: Mapped[str]
    metrics: Mapped[dict[str, Any]]
