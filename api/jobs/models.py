"""Fine-tuning jobs, their events and checkpoints. The row is the truth; the queue only rings."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import BigInteger, Connection, ForeignKey, Index, LargeBinary, String, Table, event, literal_column
from sqlalchemy.orm import Mapped, Mapper, mapped_column

from api.database import Base, JsonColumn, Listed, Sequence, now


class JobStatus(StrEnum):
    """OpenAI's job states; ``paused`` is what its own example of a pause answers."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: Every move a job may make; running -> queued is a job whose trainer was lost or shut down, failed -> queued one that
#: is resumed from its kept state.
MOVES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset(),
}
#: Nothing happens to these by itself any more.
ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class Job(Base, Listed):
    """One fine-tuning job.

    ``attempt`` is the fencing number: each claim raises it, and a worker's writes count only while it is still
    theirs.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "cotraining_key", "status"),
        Index(None, "project_id", "seq"),
        Index(None, "status", "seq"),
    )

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    #: The API key that it was made with; None for jobs of earlier releases.
    key_id: Mapped[str | None]
    status: Mapped[str] = mapped_column(default=JobStatus.VALIDATING_FILES)
    #: What the client named: a base model, or a fine-tuned one to start from.
    model: Mapped[str]
    base_model: Mapped[str]
    #: The fine-tuned model to start from, and the digest that it had when the job was made.
    warm_start: Mapped[str | None]
    warm_start_digest: Mapped[str | None]
    #: ``uora.spec.Task``.
    task: Mapped[str] = mapped_column(default="chat")
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    #: ``integrations`` of the request; None without any.
    integrations: Mapped[list[dict[str, Any]] | None] = mapped_column(JsonColumn)
    #: ``metadata`` of the request (the attribute name is taken by SQLAlchemy).
    labels: Mapped[dict[str, Any] | None]
    #: ``uora.spec.HyperparameterRequest`` as sent.
    hyperparameters: Mapped[dict[str, Any]]
    #: ``uora.spec.AdapterSpec``.
    adapter: Mapped[dict[str, Any]]
    #: Absolute peak learning rate asked for in ``peft``; None for the default.
    learning_rate: Mapped[float | None]
    #: ``uora.spec.TrainingOptions``.
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    #: ``uora.spec.TrainingSpec`` once the rows were counted.
    training_spec: Mapped[dict[str, Any] | None]
    #: What was found in the files.
    dataset_report: Mapped[dict[str, Any] | None]
    #: The latest step's numbers (``worker.progress``); {"step", "total_steps"} where it begins.
    progress: Mapped[dict[str, Any] | None]
    #: {"code", "message", "param"} when failed.
    error: Mapped[dict[str, Any] | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    #: What its run has come to, whatever became of it: tokens, without those of steps that were made again, and
    #: seconds of all attempts. What of it is in the usage ledger.
    run_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    run_seconds: Mapped[float] = mapped_column(default=0.0)
    counted_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    counted_seconds: Mapped[float] = mapped_column(default=0.0)
    fine_tuned_model: Mapped[str | None]
    #: Ids of files with the job's measurements.
    result_files: Mapped[list[str]] = mapped_column(JsonColumn, default=list)
    #: Whether the run ended before its last step because it got no better; None until it succeeded.
    stopped_early: Mapped[bool | None]
    #: Step of the checkpoint with the lowest validation loss; None without a validation file.
    best_step: Mapped[int | None]
    #: When its first attempt began.
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    estimated_finish: Mapped[datetime | None]

    #: The sweep that it was made for; None for a job of its own.
    sweep_id: Mapped[str | None] = mapped_column(index=True)
    #: The job whose request this one's was made of; its id stays when it is deleted.
    origin_job: Mapped[str | None]
    #: Queued jobs with the same one can be trained together; None for a job that is trained by itself.
    cotraining_key: Mapped[str | None] = mapped_column(String(64))

    cancel_requested: Mapped[bool] = mapped_column(default=False)
    #: Asked of a job that is validated or trained: it stops where that can be, and goes on when it is resumed.
    pause_requested: Mapped[bool] = mapped_column(default=False)
    attempt: Mapped[int] = mapped_column(default=0)
    #: Attempts in a row that ended with a trainer that vanished before it had kept a later state than was there.
    lost_trainers: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]

    #: W3C's, of the request that made the job: whoever works on it goes on with that trace. None where nobody traces.
    traceparent: Mapped[str | None] = mapped_column(String(55))

    #: Raised by every UPDATE of the row that does not set it, whoever writes it: what watchers compare.
    version: Mapped[int] = mapped_column(BigInteger, default=1, onupdate=literal_column("version") + 1)
    #: Raised by every event, see `_count_event`.
    event_count: Mapped[int] = mapped_column(BigInteger, default=0)


class JobEvent(Base, Listed):
    """A line of a job's log (type ``message``) or a measurement (type ``metrics``)."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "seq"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


@event.listens_for(JobEvent, "before_insert")
def _count_event(_mapper: Mapper[JobEvent], connection: Connection, added: JobEvent) -> None:
    """Count the event in its job's row, which locks that row until the commit.

    So an event has its ``seq`` only once all earlier writers of the job's events have committed: what becomes visible
    later also has a higher number, and a cursor skips nothing.
    """
    jobs = cast(Table, Job.__table__)
    count = jobs.c.event_count + 1
    connection.execute(jobs.update().where(jobs.c.id == added.job_id).values(event_count=count))


class Checkpoint(Base, Listed):
    """Metrics of one evaluation; its adapter answers under the name ``model_name``."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "job_id", "seq"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step_number: Mapped[int]
    model_name: Mapped[str]
    metrics: Mapped[dict[str, Any]]


class TrainingState(Base):
    """Everything that another process needs to go on with a job after ``step``: one row per job, the newest."""

    __tablename__ = "training_states"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True, unique=True)
    #: Of the job, when this was written.
    attempt: Mapped[int]
    step: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=lambda: now())
    #: ``resume`` of ``uora.training.train``.
    state: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
