"""Keeping projects within their quotas, and changing these."""

from __future__ import annotations

from sqlalchemy.orm import Session

from api.caller import Caller
from api.errors import JobQuotaExceeded, OrganizationKeyRequired, StorageQuotaExceeded
from api.jobs.models import JobStatus
from api.projects import administration
from api.projects.models import Project
from api.queue import TaskName
from api.quotas import repository
from api.quotas.models import QUOTAS, Quotas
from api.quotas.schemas import QuotasUpdate
from api.settings import Settings
from api.unit_of_work import UnitOfWork
from api.usage.repository import bytes_stored

#: Jobs that a raised limit rings for; the sweeper rings for the rest.
MAX_RINGS = 100


def check_jobs(session: Session, caller: Caller, *, added: int = 1) -> None:
    """Before so many jobs are queued. Until the transaction ends, no other can add any to the same project.

    Raises:
        JobQuotaExceeded: there would be more than the project may have.
    """
    if not caller.quotas.jobs_queued:
        return
    limit = _present_limit(session, caller, "jobs_queued")
    found = repository.count_jobs(session, caller.project_id, repository.WAITING)
    if limit and found + added > limit:
        raise JobQuotaExceeded(
            f"Found {found} jobs of this project in the queue, and {added} more; expected {limit} at most "
            "(jobs_queued). Wait until some are trained, or cancel some: POST /v1/fine_tuning/jobs/{job}/cancel."
        )


def check_bytes(session: Session, caller: Caller, *, added: int) -> None:
    """Before so many bytes are stored. Until the transaction ends, no other can add any to the same project.

    Raises:
        StorageQuotaExceeded: there would be more than the project may have.
    """
    if caller.quotas.bytes_stored:
        _check_bytes(session, caller, added=added, limit=_present_limit(session, caller, "bytes_stored"))


def look_at_bytes(session: Session, caller: Caller, *, added: int) -> None:
    """As `check_bytes`, without a lock: before the bytes are read, which are checked again."""
    if caller.quotas.bytes_stored:
        _check_bytes(session, caller, added=added, limit=caller.quotas.bytes_stored)


def _check_bytes(session: Session, caller: Caller, *, added: int, limit: int) -> None:
    found = bytes_stored(session, caller.project_id).total
    if limit and found + added > limit:
        raise StorageQuotaExceeded(
            f"Found {found} bytes of this project, and {added} more; expected {limit} at most (bytes_stored). Delete "
            "files or models that are not needed: DELETE /v1/files/{file}, /v1/models/{model}."
        )


def _present_limit(session: Session, caller: Caller, name: str) -> int:
    """What holds now, with the project's row locked; the caller's may be a second old."""
    own: int | None = getattr(repository.lock_project(session, caller.project_id), name)
    limit: int = getattr(caller.quotas, name)
    return limit if own is None else own


def get(session: Session, caller: Caller, project_id: str) -> Project:
    """A project that the caller administers; raises ``ProjectNotFound``."""
    return administration.get_project(session, caller, project_id)


def update(work: UnitOfWork, caller: Caller, project_id: str, body: QuotasUpdate, *, settings: Settings) -> Project:
    """Change a project's own values.

    Raises:
        ProjectNotFound: there is none that the caller administers.
        OrganizationKeyRequired: a project lowers its own quotas, and does not raise them.
    """
    administration.get_project(work.session, caller, project_id)
    project = repository.lock_project(work.session, project_id)
    before = Quotas.of(project, settings)
    changes = body.model_dump(exclude_unset=True)
    for name, value in changes.items():
        setattr(project, name, value)
    after = Quotas.of(project, settings)
    raised = [name for name in QUOTAS if _is_more(getattr(after, name), getattr(before, name))]
    if raised and not caller.organization_wide:
        raise OrganizationKeyRequired(
            f"This would raise {', '.join(raised)}, which needs an organization-wide admin key; with the key in use, a "
            "project can only lower its quotas."
        )
    work.describe(project_id=project.id, changes_requested=changes)
    work.session.flush()
    if "jobs_running" in raised:
        for job_id in _free_jobs(work.session, project, after.jobs_running, settings):
            work.ring(TaskName.TRAIN, job_id)
    return project


def count_jobs(session: Session, caller: Caller) -> dict[str, int]:
    """The caller's project's jobs, by quota."""
    statuses = {"jobs_running": (JobStatus.RUNNING,), "jobs_queued": repository.WAITING}
    return {name: repository.count_jobs(session, caller.project_id, of) for name, of in statuses.items()}


def _free_jobs(session: Session, project: Project, limit: int, settings: Settings) -> list[str]:
    """Queued jobs that were held back by a lower limit."""
    if not limit:  # of which there is none any more
        return list(repository.list_queued(session, project.id, limit=MAX_RINGS))
    default = settings.quota_jobs_running
    return list(repository.jobs_to_ring(session, project.id, default_running=default, limit=min(limit, MAX_RINGS)))


def _is_more(after: int, before: int) -> bool:
    return before != 0 and (after == 0 or after > before)
