"""How a job ends: each end is one fenced transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from api.database import now
from api.jobs.models import Job, JobStatus
from api.jobs.repository import add_event
from uora.artifact import Artifact, loads
from worker.failures import Failure
from worker.lease import Lease, Sessions, writing
from worker.messages import Done
from worker.progress import make_adapter, result_name


@dataclass(frozen=True)
class Finished:
    """The run is complete, and this is its adapter."""

    done: Done
    artifact: bytes


def succeed(sessions: Sessions, lease: Lease, finished: Finished) -> None:
    """Commit the adapter and "succeeded" in one transaction: neither is ever there without the other.

    A cancel that was accepted before this commit wins: the user was told that there will be no model.

    Raises:
        LeaseLost: the job is no longer this worker's.
        ArtifactError: the child wrote something else than an adapter.
    """
    verified = loads(finished.artifact)
    with writing(sessions, lease) as (session, job):
        if job.cancel_requested:
            mark_cancelled(session, job)
        else:
            _mark_succeeded(session, job, finished, verified)


def fail(sessions: Sessions, lease: Lease, failure: Failure) -> None:
    """Record why there will be no model. Checkpoints made before stay: each is whole, and may be of use.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    with writing(sessions, lease) as (session, job):
        mark_failed(session, job, failure)


def cancel(sessions: Sessions, lease: Lease) -> None:
    """Record that the training was stopped at the user's request.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    with writing(sessions, lease) as (session, job):
        mark_cancelled(session, job)


def mark_failed(session: Session, job: Job, failure: Failure) -> None:
    """End a job that the caller has locked."""
    _end(job, JobStatus.FAILED)
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
    _end(job, JobStatus.CANCELLED)
    add_event(session, job.id, message="Cancelled", level="warn")


def _mark_succeeded(session: Session, job: Job, finished: Finished, verified: Artifact) -> None:
    name = result_name(session, job)
    session.add(make_adapter(job, name, verified, finished.artifact))
    _end(job, JobStatus.SUCCEEDED)
    job.fine_tuned_model = name
    job.trained_tokens = finished.done.trained_tokens
    add_event(session, job.id, message=f"New fine-tuned model created: {name}")
    add_event(session, job.id, message="The job has successfully completed")


def _end(job: Job, status: JobStatus) -> None:
    job.status = status
    job.finished_at = now()
    job.estimated_finish = None
    job.lease_owner = None
    job.lease_until = None
