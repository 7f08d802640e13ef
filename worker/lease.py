"""Who works on a job. The claim is one atomic UPDATE; its number fences off everybody who had the job before.

A message of the queue may be lost, repeated or late: only the holder of the lease trains, and only the newest
lease can write.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, case, delete, false, func, or_, select, update
from sqlalchemy.orm import Session, sessionmaker

from api.database import UtcDateTime, now
from api.jobs.models import Checkpoint, Job, JobStatus
from api.models.models import Adapter

Sessions = sessionmaker[Session]


class LeaseLost(Exception):
    """The job is no longer this worker's: nothing of it may be written any more."""


@dataclass(frozen=True)
class Lease:
    """A worker's claim on a job; ``attempt`` is the fencing number, ``owner`` names the worker in logs."""

    job_id: str
    project_id: str
    attempt: int
    owner: str


@dataclass(frozen=True)
class Renewal:
    """What a renewal found."""

    ours: bool
    cancel_requested: bool


def claim(sessions: Sessions, job_id: str, *, owner: str, ttl: timedelta, max_attempts: int = 3) -> Lease | None:
    """Take a job that is queued, or whose trainer vanished. Of several claimers one succeeds.

    Checkpoints of an attempt that was lost are deleted with the claim: the job starts again from step 0.

    Args:
        sessions: where the job is.
        job_id: the job to take.
        owner: names this worker.
        ttl: how long the claim holds without a renewal.
        max_attempts: vanished trainers after which nobody may try again (the sweeper fails the job).

    Returns:
        The lease, or None if the job is not free: somebody has it, it is over, or it is to be cancelled.
    """
    with sessions.begin() as session:
        moment = database_now(session)
        lost = and_(Job.status == JobStatus.RUNNING, Job.lease_until < moment, Job.lost_trainers + 1 < max_attempts)
        taken = session.execute(
            update(Job)
            .where(
                Job.id == job_id,
                Job.cancel_requested == false(),
                or_(Job.status == JobStatus.QUEUED, lost),
            )
            .values(
                status=JobStatus.RUNNING,
                lease_owner=owner,
                lease_until=moment + ttl,
                attempt=Job.attempt + 1,
                lost_trainers=Job.lost_trainers + case((Job.status == JobStatus.RUNNING, 1), else_=0),
                started_at=moment,
                progress=None,
                estimated_finish=None,
            )
            .returning(Job.project_id, Job.attempt)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        if taken is None:
            return None
        _delete_checkpoints(session, job_id)
        return Lease(job_id=job_id, project_id=taken.project_id, attempt=taken.attempt, owner=owner)


def renew(sessions: Sessions, lease: Lease, *, ttl: timedelta) -> Renewal:
    """Hold the lease for another ``ttl``, and learn whether the job is to be cancelled.

    A lease that ran out but that nobody has taken yet is still ours.
    """
    with sessions.begin() as session:
        cancel_requested = session.scalar(
            update(Job)
            .where(_held(lease))
            .values(lease_until=database_now(session) + ttl)
            .returning(Job.cancel_requested)
            .execution_options(synchronize_session=False)
        )
    return Renewal(ours=cancel_requested is not None, cancel_requested=bool(cancel_requested))


def release(sessions: Sessions, lease: Lease) -> bool:
    """Give the job back to the queue, for an orderly shutdown.

    Returns:
        False if it is no longer ours, or to be cancelled: nobody would claim it from the queue.
    """
    with sessions.begin() as session:
        freed = session.scalar(
            update(Job)
            .where(_held(lease), Job.cancel_requested == false())
            .values(status=JobStatus.QUEUED, lease_owner=None, lease_until=None, progress=None)
            .returning(Job.id)
            .execution_options(synchronize_session=False)
        )
    return freed is not None


@contextmanager
def writing(sessions: Sessions, lease: Lease) -> Iterator[tuple[Session, Job]]:
    """One fenced transaction: commits if the body ends well and the lease is still ours.

    Raises:
        LeaseLost: before the body runs, when the job is no longer this worker's.
    """
    with sessions.begin() as session:
        yield session, fenced(session, lease)


def fenced(session: Session, lease: Lease) -> Job:
    """Check the lease and lock the job's row until the transaction ends, so that nobody claims it in between.

    Returns:
        The job's row, freshly read.

    Raises:
        LeaseLost: when the job is no longer this worker's.
    """
    held = session.scalar(
        update(Job)
        .where(_held(lease))
        .values(attempt=Job.attempt)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    if held is None:
        raise LeaseLost(f"job {lease.job_id}: attempt {lease.attempt} of {lease.owner} is over, or was taken over")
    return session.execute(
        select(Job).where(Job.id == lease.job_id).execution_options(populate_existing=True)
    ).scalar_one()


def database_now(session: Session) -> datetime:
    """The database's clock, so that workers whose own clocks differ agree on when a lease runs out.

    SQLite has none, and needs none: all its users are on one machine.
    """
    if session.get_bind().dialect.name == "postgresql":
        return session.execute(select(func.clock_timestamp(type_=UtcDateTime()))).scalar_one()
    return now()


def _held(lease: Lease) -> ColumnElement[bool]:
    return and_(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.status == JobStatus.RUNNING)


def _delete_checkpoints(session: Session, job_id: str) -> None:
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == job_id))
    session.execute(
        delete(Adapter).where(Adapter.job_id == job_id, Adapter.checkpoint_step.is_not(None)),
    )
