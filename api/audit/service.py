"""Writing and reading the audit log."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.audit import repository
from api.audit.models import AuditLog
from api.audit.repository import AuditFilter
from api.caller import Caller
from api.database import new_id, now
from api.pagination import Page, PageQuery
from api.unit_of_work import UnitOfWork


@dataclass(frozen=True)
class Origin:
    """Where a change came from."""

    action: str
    request_id: str
    ip_address: str | None


def record(work: UnitOfWork, caller: Caller, origin: Origin, *, object_id: str | None) -> None:
    """Write down the change that the unit of work is about to commit."""
    work.session.add(
        AuditLog(
            id=new_id("audit_log-"),
            action=origin.action,
            object_id=object_id,
            key_id=caller.key_id,
            project_id=work.project_id or caller.project_id,
            request_id=origin.request_id,
            ip_address=origin.ip_address,
            details=work.details or None,
            created_at=now(),
        )
    )


def list_entries(session: Session, caller: Caller, *, query: PageQuery, wanted: AuditFilter) -> Page[AuditLog]:
    """A page of the changes to the caller's project, or with an organization-wide key to all."""
    only = None if caller.organization_wide else caller.project_id
    return repository.page(session, query, wanted, only_project=only)
