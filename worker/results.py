"""How a job ends: each end is one fenced transaction."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.database import new_id, now
from api.files.models import File
from api.files.schemas import RESULTS
from api.jobs.models import Job, JobStatus
from api.jobs.repository import add_event, best_checkpoint, drop_state, move_job
from api.storage import ObjectStore
from uora.artifact import Artifact, loads
from worker.failures import Failure
from worker.lease import Lease, Sessions, rewind, writing
from worker.measurements import measurements_csv
from worker.messages import Done
from worker.progress import Trained, make_adapter, result_name


@dataclass(frozen=True)
class Finished:
    """The run is complete, and this is its adapter."""

    done: Done
    artifact: bytes


#: Name of the file with a job's measurements.
RESULT_FILENAME = "step_metrics.csv"


#: What a run has come to that nobody has followed: no more than its job says.
NOTHING = Trained()


def succeed(
    sessions: Sessions, lease: Lease, finished: Finished, *, storage: ObjectStore, trained: Trained = NOTHING
) -> None:
    """Commit the adapter, the result file and "succeeded" in one transaction: none is ever there without the others.

    A cancel that was accepted before this commit wins: the user was told that there will be no model.

    Raises:
        LeaseLost: the job is no longer this worker's.
        ArtifactError: the child wrote something else than an adapter.
    """
    verified = loads(finished.artifact)
    file_id = new_id("file-")
    try:
        with writing(sessions, lease) as (session, job):
            trained.note(job)
            if job.cancel_requested:
                mark_cancelled(session, job)
            else:
                _mark_succeeded(session, job, finished, verified)
                _add_result_file(session, job, file_id, storage)
    except BaseException:
        _remove_orphan(sessions, file_id, storage)
        raise


def fail(sessions: Sessions, lease: Lease, failure: Failure, *, trained: Trained = NOTHING) -> None:
    """Record why there will be no model. Checkpoints and the state stay: each is whole, and may be of use.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    with writing(sessions, lease) as (session, job):
        trained.note(job)
        mark_failed(session, job, failure)


def cancel(sessions: Sessions, lease: Lease, *, trained: Trained = NOTHING) -> None:
    """Record that the training was stopped at the user's request.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    with writing(sessions, lease) as (session, job):
        trained.note(job)
        mark_cancelled(session, job)


def interrupt(sessions: Sessions, lease: Lease, *, alone: bool = False, trained: Trained = NOTHING) -> None:
    """Record that the training stopped before its end: for a cancel or a pause, or else to be queued again.

    Args:
        sessions: where the job is.
        lease: of the job.
        alone: whether no other job may be trained together with it any more.
        trained: what the run has come to.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    with writing(sessions, lease) as (session, job):
        trained.note(job)
        if alone:
            job.cotraining_key = None
        if job.cancel_requested:
            mark_cancelled(session, job)
        elif job.pause_requested:
            mark_paused(session, job)
        else:
            _leave(session, job, JobStatus.QUEUED)
            rewind(session, job.id)


def mark_paused(session: Session, job: Job) -> None:
    """Stop a job, which the caller has locked, until its user resumes it."""
    _leave(session, job, JobStatus.PAUSED)
    step = rewind(session, job.id)
    add_event(session, job.id, message="Paused" if step is None else f"Paused after step {step}")


def mark_failed(session: Session, job: Job, failure: Failure) -> None:
    """End a job that the caller has locked."""
    _end(session, job, JobStatus.FAILED)
    job.error = stored_error(failure)
    add_failure_event(session, job.id, failure)


def stored_error(failure: Failure) -> dict[str, Any]:
    """A failure as ``job.error`` holds it."""
    return failure.model_dump(include={"code", "message", "param"})


def add_failure_event(session: Session, job_id: str, failure: Failure) -> None:
    """Append the failure to the job's log."""
    data = failure.model_dump(mode="json", exclude={"message"})
    add_event(session, job_id, message=f"The job failed: {failure.message}", level="error", data=data)


def mark_cancelled(session: Session, job: Job) -> None:
    """End a job that the caller has locked."""
    _end(session, job, JobStatus.CANCELLED)
    drop_state(session, job.id)
    add_event(session, job.id, message="Cancelled", level="warn")


def _mark_succeeded(session: Session, job: Job, finished: Finished, verified: Artifact) -> None:
    Trained(tokens=finished.done.trained_tokens).note(job)
    name = result_name(session, job)
    session.add(make_adapter(job, name, verified, finished.artifact))
    _end(session, job, JobStatus.SUCCEEDED)
    drop_state(session, job.id)
    best = best_checkpoint(session, job.id)
    job.best_step = best.step_number if best else None
    job.stopped_early = finished.done.stopped_early
    job.fine_tuned_model = name
    job.trained_tokens = finished.done.trained_tokens
    add_event(session, job.id, message=f"New fine-tuned model created: {name}")
    add_event(session, job.id, message="The job has successfully completed")


def _add_result_file(session: Session, job: Job, file_id: str, storage: ObjectStore) -> None:
    content = measurements_csv(session, job.id)
    stored = storage.write(file_id, io.BytesIO(content), max_bytes=len(content))
    session.add(
        File(
            id=file_id,
            project_id=job.project_id,
            filename=RESULT_FILENAME,
            purpose=RESULTS,
            bytes=stored.bytes,
            sha256=stored.sha256,
            storage_key=file_id,
        )
    )
    job.result_files = [file_id]


def _remove_orphan(sessions: Sessions, file_id: str, storage: ObjectStore) -> None:
    """Remove bytes that no row names; where the database does not answer, its commit may have come through."""
    with suppress(SQLAlchemyError), sessions() as session:
        if not session.scalar(select(exists().where(File.id == file_id))):
            storage.delete(file_id)


def _end(session: Session, job: Job, status: JobStatus) -> None:
    _leave(session, job, status)
    job.finished_at = now()


def _leave(session: Session, job: Job, status: JobStatus) -> None:
    """Move a job that the caller has locked, and let go of it."""
    job.pause_requested = False
    job.estimated_finish = None
    job.lease_owner = None
    job.lease_until = None
    source = JobStatus(job.status)
    if not move_job(session, job.id, source=source, target=status):
        raise RuntimeError(f"{job.id} is not {source} any more, though its row was locked")
    session.refresh(job, ["status"])
