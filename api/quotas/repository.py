"""Queries of quotas. Whoever counts to add locks the project's row first, so that two together do not go over."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session, aliased

from api.jobs.models import Job, JobStatus
from api.projects.models import Project

#: Jobs that wait for a trainer, or will.
WAITING = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED)


def lock_project(session: Session, project_id: str) -> Project:
    """The project's row, locked until the transaction ends against others who count, and against nobody else."""
    locked = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
    return session.execute(locked.execution_options(populate_existing=True)).scalar_one()


def lock_project_of(session: Session, job_id: str, *, default_running: int) -> None:
    """As `lock_project`, where the job's project has a limit of running jobs."""
    limited = func.coalesce(Project.jobs_running, default_running) > 0
    of_job = select(Project.seq).join(Job, Job.project_id == Project.id).where(Job.id == job_id, limited)
    session.execute(of_job.with_for_update(key_share=True, of=Project))


def count_jobs(session: Session, project_id: str, statuses: Collection[JobStatus]) -> int:
    """Jobs of the project that have one of these."""
    counted = select(func.count()).select_from(Job).where(Job.project_id == project_id, Job.status.in_(statuses))
    return session.execute(counted).scalar_one()


def may_run(*, default_running: int) -> ColumnElement[bool]:
    """Criterion: the job's project has fewer other jobs running than it may have.

    Args:
        default_running: the limit of projects without an own one; 0 for none.
    """
    other = aliased(Job)
    running = (
        select(func.count())
        .select_from(other)
        .where(other.project_id == Job.project_id, other.status == JobStatus.RUNNING, other.id != Job.id)
        .correlate(Job)
        .scalar_subquery()
    )
    own = select(func.coalesce(Project.jobs_running, default_running)).where(Project.id == Job.project_id)
    limit = own.correlate(Job).scalar_subquery()
    return or_(limit == 0, running < limit)


def jobs_to_ring(session: Session, project_id: str, *, default_running: int, limit: int) -> Sequence[str]:
    """The oldest of a limited project's queued jobs, if one of them may run: they may have been refused before."""
    limited = func.coalesce(Project.jobs_running, default_running) > 0
    waiting = (
        select(Job.id)
        .join(Project, Project.id == Job.project_id)
        .where(Job.project_id == project_id, Job.status == JobStatus.QUEUED, limited)
        .where(may_run(default_running=default_running))
    )
    return session.scalars(waiting.order_by(Job.seq).limit(limit)).all()


def list_queued(session: Session, project_id: str, *, limit: int) -> Sequence[str]:
    """The oldest of a project's queued jobs."""
    queued = select(Job.id).where(Job.project_id == project_id, Job.status == JobStatus.QUEUED)
    return session.scalars(queued.order_by(Job.seq).limit(limit)).all()
