"""Who works on a job. The claim is one atomic UPDATE; its number fences off everybody who had the job before.

A message of the queue may be lost, repeated or late: only the holder of the lease trains, and only the newest
lease can write.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import ColumnElement, Select, and_, case, false, func, or_, select, update
from sqlalchemy.orm import Session, aliased, sessionmaker

import api.projects.models  # noqa: F401 - jobs refer to its table
from api.database import database_now
from api.jobs.models import Job, JobStatus
from api.jobs.repository import state_step
from api.quotas import repository as quotas
from worker.tracing import AttemptTrace

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
    #: Of the request that made the job.
    traceparent: str | None = None
    trace: AttemptTrace = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        trace = AttemptTrace(self.traceparent, job_id=self.job_id, attempt=self.attempt)
        object.__setattr__(self, "trace", trace)


@dataclass(frozen=True)
class Renewal:
    """What a renewal found."""

    ours: bool
    cancel_requested: bool
    pause_requested: bool


def claim(
    sessions: Sessions, job_id: str, *, owner: str, ttl: timedelta, max_attempts: int = 3, max_running: int = 0
) -> Lease | None:
    """Take a job that is queued, or whose trainer vanished. Of several claimers one succeeds.

    The job goes on from its kept state. What later steps of a lost attempt left stays: those steps are made again, and
    what they report again is not written twice.

    Args:
        sessions: where the job is.
        job_id: the job to take.
        owner: names this worker.
        ttl: how long the claim holds without a renewal.
        max_attempts: vanished trainers in a row, none of which kept a later state, after which nobody may try again
            (the sweeper fails the job).
        max_running: jobs at once of a project that has no limit of its own; 0 for no limit.

    Returns:
        The lease, or None if the job is not free: somebody has it, it is over, it is to be cancelled or paused,
        or its project has as many others running as it may have.
    """
    with sessions.begin() as session:
        quotas.lock_project_of(session, job_id, default_running=max_running)
        moment = database_now(session)
        lost = and_(Job.status == JobStatus.RUNNING, Job.lease_until < moment, Job.lost_trainers + 1 < max_attempts)
        taken = session.execute(
            update(Job)
            .where(
                Job.id == job_id,
                Job.cancel_requested == false(),
                Job.pause_requested == false(),
                or_(Job.status == JobStatus.QUEUED, lost),
                quotas.may_run(default_running=max_running),
            )
            .values(
                status=JobStatus.RUNNING,
                lease_owner=owner,
                lease_until=moment + ttl,
                attempt=Job.attempt + 1,
                lost_trainers=Job.lost_trainers + case((Job.status == JobStatus.RUNNING, 1), else_=0),
                started_at=func.coalesce(Job.started_at, moment),
                estimated_finish=None,
            )
            .returning(Job.project_id, Job.attempt, Job.traceparent)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        if taken is None:
            return None
        rewind(session, job_id)
        return Lease(
            job_id=job_id,
            project_id=taken.project_id,
            attempt=taken.attempt,
            owner=owner,
            traceparent=taken.traceparent,
        )


def claim_companions(
    sessions: Sessions, lease: Lease, *, at_most: int, ttl: timedelta, max_running: int = 0
) -> list[Lease]:
    """Take queued jobs of any project that can be trained together with the job of ``lease``, the oldest first.

    A job that a trainer was lost with is none, nor has any: it may have been the cause.

    Args:
        sessions: where the jobs are.
        lease: of the first job.
        at_most: how many to take.
        ttl: as in `claim`.
        max_running: as in `claim`.
    """
    taken: list[Lease] = []
    last_seq = 0
    while len(taken) < at_most:
        with sessions() as session:
            companions = _companions(lease).where(quotas.may_run(default_running=max_running), Job.seq > last_seq)
            candidate = session.execute(companions.limit(1)).one_or_none()
        if candidate is None:
            break
        last_seq = candidate.seq
        companion = claim(sessions, candidate.id, owner=lease.owner, ttl=ttl, max_running=max_running)
        if companion is not None:  # else somebody was faster
            taken.append(companion)
    return taken


def _companions(lease: Lease) -> Select[int, str]:
    first = aliased(Job)
    return (
        select(Job.seq, Job.id)
        .join(first, first.cotraining_key == Job.cotraining_key)
        .where(
            first.id == lease.job_id,
            first.lost_trainers == 0,
            Job.status == JobStatus.QUEUED,
            Job.lost_trainers == 0,
        )
        .order_by(Job.seq)
    )


def renew(sessions: Sessions, lease: Lease, *, ttl: timedelta) -> Renewal:
    """Hold the lease for another ``ttl``, and learn whether the job is to be cancelled.

    A lease that ran out but that nobody has taken yet is still ours.
    """
    with sessions.begin() as session:
        found = session.execute(
            update(Job)
            .where(_held(lease))
            .values(lease_until=database_now(session) + ttl, version=Job.version)  # nothing that is shown
            .returning(Job.cancel_requested, Job.pause_requested)
            .execution_options(synchronize_session=False)
        ).one_or_none()
    if found is None:
        return Renewal(ours=False, cancel_requested=False, pause_requested=False)
    return Renewal(ours=True, cancel_requested=found.cancel_requested, pause_requested=found.pause_requested)


def rewind(session: Session, job_id: str) -> int | None:
    """Let a job's progress say where it would go on, and return that step; None if that is the beginning."""
    step = state_step(session, job_id)
    job = session.execute(select(Job).where(Job.id == job_id).execution_options(populate_existing=True)).scalar_one()
    if step is None or job.progress is None:
        job.progress = None
    elif job.progress["step"] != step:  # a lost attempt had come further
        job.progress = {"step": step, "total_steps": job.progress["total_steps"]}
    job.estimated_finish = None
    return step


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


def _held(lease: Lease) -> ColumnElement[bool]:
    return and_(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.status == JobStatus.RUNNING)
