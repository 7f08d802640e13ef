"""What users see of a running job: its events, its progress, its checkpoints. Every write is fenced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.database import new_id, now
from api.jobs.models import Checkpoint, Job, JobEvent, TrainingState
from api.jobs.repository import add_event, drop_state, state_step
from api.models.models import Adapter
from api.models.service import checkpoint_name, model_name
from api.projects.models import Project
from uora.artifact import Artifact, loads
from worker.lease import Lease, Sessions, writing
from worker.messages import Evaluated, Metrics, State, Step

#: Metrics events of one job, about; longer runs get every k-th step's.
MAX_METRICS_EVENTS = 200
PROGRESS_INTERVAL_SECONDS = 0.5
#: Neither database takes a value of more than 1 GB.
MAX_STATE_BYTES = 900_000_000
_SHOWN = frozenset(
    {"step", "total_steps", "train_loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds_left", "hits"}
)


@dataclass(frozen=True)
class Trained:
    """What a run has come to, all attempts together."""

    tokens: int = 0
    seconds: float = 0.0

    def note(self, job: Job) -> None:
        """Write it into the job, which has more where a lost attempt had come further."""
        job.run_tokens = max(job.run_tokens, self.tokens)
        job.run_seconds = max(job.run_seconds, self.seconds)


class JobProgress:
    """Records the reports of one training run. Raises ``LeaseLost`` when the job is no longer this worker's."""

    def __init__(self, sessions: Sessions, lease: Lease) -> None:
        self._sessions = sessions
        self._lease = lease
        self._total_steps = 0
        self._latest: Step | None = None
        self._last_write = -math.inf
        self._started: float | None = None
        #: Of the attempts before.
        self._seconds_before = 0.0

    @property
    def trained(self) -> Trained:
        """What the run has come to by now."""
        return Trained(
            tokens=self._latest.trained_tokens if self._latest else 0,
            seconds=0.0 if self._started is None else self._seconds_before + monotonic() - self._started,
        )

    def on_start(self, total_steps: int) -> Job:
        """Record that the first step of this attempt begins; returns the job as it is then."""
        self._total_steps = total_steps
        with writing(self._sessions, self._lease) as (session, job):
            self._started, self._seconds_before = monotonic(), job.run_seconds
            kept = state_step(session, job.id)
            job.progress = {"step": kept or 0, "total_steps": total_steps}
            add_event(
                session, job.id, message="Fine-tuning job started" if kept is None else f"Resuming from step {kept}"
            )
        return job

    def on_step(self, step: Step) -> None:
        """Record a step: its metrics event, if its turn has come, and the progress, twice a second at most.

        A step that a lost attempt made before has its event already.
        """
        self._latest = step
        event_due = is_event_due(step.step, total_steps=step.total_steps)
        if not event_due and monotonic() - self._last_write < PROGRESS_INTERVAL_SECONDS:
            return
        self._last_write = monotonic()
        with writing(self._sessions, self._lease) as (session, job):
            _show(job, step)
            self.trained.note(job)
            if event_due and not _has_step_event(session, job.id, step.step):
                data = step.model_dump(exclude={"type", "run"})
                add_metrics_event(session, job.id, step.step, step.total_steps, metrics=data)

    def on_evaluation(self, evaluated: Evaluated, artifact: bytes) -> None:
        """Verify and store a checkpoint: its row, its adapter and its events in one transaction.

        Raises:
            ArtifactError: the child wrote something else than an adapter.
        """
        verified = loads(artifact)
        with writing(self._sessions, self._lease) as (session, job):
            name = checkpoint_name(result_name(session, job), step=evaluated.step)
            if session.scalar(select(Adapter.seq).where(Adapter.id == name)) is not None:
                return  # written before: by a lost attempt, or in a transaction whose answer was lost
            metrics = finite(evaluated.metrics)
            session.add(make_adapter(job, name, verified, artifact, checkpoint_step=evaluated.step))
            session.add(
                Checkpoint(
                    id=new_id("ftckpt_"),
                    job_id=job.id,
                    step_number=evaluated.step,
                    model_name=name,
                    metrics=metrics | {"step": evaluated.step},
                )
            )
            # Without validation rows it would say again what the step's own event says.
            validated = any("valid" in name for name in metrics)
            if validated or not _has_step_event(session, job.id, evaluated.step):
                add_metrics_event(session, job.id, evaluated.step, self._total_steps, metrics=metrics)
            add_event(session, job.id, message=f"Checkpoint created at step {evaluated.step}")

    def on_state(self, state: State, content: bytes) -> None:
        """Keep what the job goes on from, instead of what was kept before, together with the progress.

        A state that no database takes is not worth the run: it goes on without.
        """
        with writing(self._sessions, self._lease) as (session, job):
            if len(content) > MAX_STATE_BYTES:
                _warn_once(session, job.id, _too_large(len(content)))
                return
            before = state_step(session, job.id)
            drop_state(session, job.id)
            session.add(
                TrainingState(
                    job_id=job.id,
                    attempt=self._lease.attempt,
                    step=state.step,
                    bytes=len(content),
                    state=content,
                )
            )
            if before is None or state.step > before:
                job.lost_trainers = 0
            if self._latest is not None:
                _show(job, self._latest)
                self.trained.note(job)


def is_event_due(step: int, *, total_steps: int) -> bool:
    """Whether a step has a metrics event: the first, the last, and as many between as users look at."""
    every = math.ceil(max(total_steps, 1) / MAX_METRICS_EVENTS)
    return step in (1, total_steps) or step % every == 0


def _show(job: Job, step: Step) -> None:
    job.progress = step.model_dump(include=set(_SHOWN))
    if step.seconds_left is not None:
        job.estimated_finish = now() + timedelta(seconds=step.seconds_left)


def _has_step_event(session: Session, job_id: str, step: int) -> bool:
    # Evaluations have events of the same step, without a count of tokens.
    of_step = select(JobEvent.seq).where(
        JobEvent.job_id == job_id,
        JobEvent.type == "metrics",
        JobEvent.data["step"].as_float() == step,  # events of evaluations had floats once
        JobEvent.data["trained_tokens"].as_integer().is_not(None),
    )
    return session.scalar(of_step.limit(1)) is not None


def _warn_once(session: Session, job_id: str, message: str) -> None:
    said = select(JobEvent.seq).where(JobEvent.job_id == job_id, JobEvent.message == message)
    if session.scalar(said.limit(1)) is None:
        add_event(session, job_id, message=message, level="warn")


def _too_large(size: int) -> str:
    return (
        f"The state of the run has {size / 2**20:.0f} MiB, more than can be kept: a pause or a lost trainer costs the "
        "steps since the last state that was kept. A smaller rank makes it smaller."
    )


def add_metrics_event(session: Session, job_id: str, step: int, total_steps: int, *, metrics: dict[str, Any]) -> None:
    """Append a measurement, in OpenAI's words."""
    losses = ", ".join(
        f"{words}={metrics[name]:.2f}"
        for name, words in (
            ("train_loss", "training loss"),
            ("valid_loss", "validation loss"),
            ("full_valid_loss", "full validation loss"),
        )
        if metrics.get(name) is not None
    )
    data = metrics | {"step": step, "total_steps": total_steps}  # a measurement's own step is a float
    message = f"Step {step}/{total_steps}: {losses}".removesuffix(": ")
    add_event(session, job_id, message=message, type="metrics", data=data)


def result_name(session: Session, job: Job) -> str:
    """The name under which the job's result answers."""
    slug = session.execute(select(Project.slug).where(Project.id == job.project_id)).scalar_one()
    return model_name(job.base_model, slug=slug, suffix=job.suffix, job_id=job.id)


def make_adapter(
    job: Job, name: str, verified: Artifact, artifact: bytes, *, checkpoint_step: int | None = None
) -> Adapter:
    """The row that makes ``artifact`` servable."""
    return Adapter(
        id=name,
        project_id=job.project_id,
        job_id=job.id,
        base_model=job.base_model,
        parent=job.warm_start,
        checkpoint_step=checkpoint_step,
        digest=verified.manifest.digest,
        manifest=verified.manifest.model_dump(mode="json"),
        artifact=artifact,
    )


def finite(metrics: Metrics) -> dict[str, float]:
    """Without the measurements that were not finite."""
    return {name: value for name, value in metrics.items() if value is not None}


def read_stored(work_dir: Path, file: str) -> bytes:
    """What the child stored under ``file``; only names directly in its work folder are read."""
    return (work_dir / Path(file).name).read_bytes()


def remove_stored(work_dir: Path, file: str) -> None:
    """Make room: a run may store many states."""
    (work_dir / Path(file).name).unlink(missing_ok=True)
