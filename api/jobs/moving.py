"""Moves of a job at its user's request: each is one guarded attempt, since a worker may move the job in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_never

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import now
from api.errors import JobNotCancellable, JobNotPausable, JobNotResumable
from api.files.repository import FileRepository
from api.jobs.models import Job, JobStatus
from api.jobs.repository import (
    add_event,
    drop_state,
    move_job,
    request_cancel,
    request_pause,
    state_step,
    withdraw_pause,
)
from api.queue import TaskName
from api.quotas import service as quotas
from api.unit_of_work import UnitOfWork

#: A job moves at most twice while a client's request is carried out; more rounds mean a fault.
ROUNDS = 5


def until_done(session: Session, job: Job, attempt: Callable[[], bool]) -> Job:
    """Repeat a guarded move until it is made from the status that the job has by then; the job as it is then."""
    for _ in range(ROUNDS):
        done = attempt()
        session.refresh(job)  # as the statement left it, or as a worker that came in between did
        if done:
            return job
    raise RuntimeError(f"{job.id} changed {ROUNDS} times while a request was carried out; it is {job.status}")


def try_cancel(session: Session, job: Job) -> bool:
    """One guarded attempt from the status that was read; False if the job has another one by now."""
    status = JobStatus(job.status)
    match status:
        case JobStatus.VALIDATING_FILES | JobStatus.QUEUED | JobStatus.PAUSED:
            moved = move_job(
                session, job.id, source=status, target=JobStatus.CANCELLED, finished_at=now(), progress=None
            )
            if moved:
                drop_state(session, job.id)
                add_event(session, job.id, message="Cancelled", level="warn")
            return moved
        case JobStatus.RUNNING:
            if job.cancel_requested:
                return True
            asked = request_cancel(session, job.id)
            if asked:
                add_event(session, job.id, message="Cancellation requested", level="warn")
            return asked
        case JobStatus.SUCCEEDED | JobStatus.FAILED | JobStatus.CANCELLED:
            raise JobNotCancellable(f"The job {job.id} is already {status}; only an unfinished one can be cancelled.")
        case _:
            assert_never(status)


def try_pause(session: Session, job: Job) -> bool:
    """As `try_cancel`."""
    status = JobStatus(job.status)
    match status:
        case JobStatus.PAUSED:
            return True
        case JobStatus.QUEUED:
            moved = move_job(session, job.id, source=status, target=JobStatus.PAUSED)
            if moved:
                add_event(session, job.id, message="Paused")
            return moved
        case JobStatus.VALIDATING_FILES | JobStatus.RUNNING:
            if job.cancel_requested:
                raise JobNotPausable(f"The job {job.id} is being cancelled; it cannot be paused any more.")
            if job.pause_requested:
                return True
            asked = request_pause(session, job.id, status=status)
            if asked:
                add_event(session, job.id, message="Pause requested")
            return asked
        case JobStatus.SUCCEEDED | JobStatus.FAILED | JobStatus.CANCELLED:
            raise JobNotPausable(f"The job {job.id} is already {status}; only an unfinished one can be paused.")
        case _:
            assert_never(status)


def try_resume(work: UnitOfWork, caller: Caller, job: Job) -> bool:
    """As `try_cancel`."""
    status = JobStatus(job.status)
    match status:
        case JobStatus.PAUSED:
            return _queue_again(work, caller, job, source=status)
        case JobStatus.FAILED:
            _check_can_go_on(work.session, caller, job)
            # By itself: what it failed of, say want of memory, must not reach others.
            return _queue_again(
                work,
                caller,
                job,
                source=status,
                error=None,
                finished_at=None,
                lost_trainers=0,
                cancel_requested=False,
                cotraining_key=None,
            )
        case JobStatus.VALIDATING_FILES | JobStatus.RUNNING if job.pause_requested:
            taken_back = withdraw_pause(work.session, job.id, status=status)
            if taken_back:
                add_event(work.session, job.id, message="Pause withdrawn")
            return taken_back
        case (
            JobStatus.VALIDATING_FILES
            | JobStatus.QUEUED
            | JobStatus.RUNNING
            | JobStatus.SUCCEEDED
            | JobStatus.CANCELLED
        ):
            raise JobNotResumable(
                f"The job {job.id} is {status}; only a paused one, or a failed one whose state was kept, can be "
                "resumed."
            )
        case _:
            assert_never(status)


def _queue_again(work: UnitOfWork, caller: Caller, job: Job, *, source: JobStatus, **values: Any) -> bool:
    quotas.check_jobs(work.session, caller)
    moved = move_job(work.session, job.id, source=source, target=JobStatus.QUEUED, pause_requested=False, **values)
    if moved:
        add_event(work.session, job.id, message="Resumed, moving job to queued state")
        work.ring(TaskName.TRAIN, job.id)
    return moved


def _check_can_go_on(session: Session, caller: Caller, job: Job) -> None:
    """Whether a failed job still has what it needs."""
    if state_step(session, job.id) is None:
        raise JobNotResumable(
            f"The job {job.id} failed before a state was kept that it could go on from; create it again."
        )
    files = FileRepository(session, caller.project_id)
    for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
        if file_id is not None:
            files.lock(file_id, shared=True, param=param)
