"""Queries of the audit log. It is above all tenants: who may see whose is for the service to say."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from api.audit.models import AuditLog
from api.pagination import Page, PageQuery, paginate


@dataclass(frozen=True)
class AuditFilter:
    """Which entries. None and empty do not filter."""

    project_ids: Collection[str] = ()
    actions: Collection[str] = ()
    key_ids: Collection[str] = ()
    object_ids: Collection[str] = ()
    #: From when, included, and until when, not included.
    since: datetime | None = None
    before: datetime | None = None

    def criteria(self) -> list[ColumnElement[bool]]:
        """As SQL."""
        lists = (
            (AuditLog.project_id, self.project_ids),
            (AuditLog.action, self.actions),
            (AuditLog.key_id, self.key_ids),
            (AuditLog.object_id, self.object_ids),
        )
        found: list[ColumnElement[bool]] = [column.in_(values) for column, values in lists if values]
        if self.since is not None:
            found.append(AuditLog.created_at >= self.since)
        if self.before is not None:
            found.append(AuditLog.created_at < self.before)
        return found


def page(session: Session, query: PageQuery, wanted: AuditFilter, *, only_project: str | None) -> Page[AuditLog]:
    """A page of the entries, newest first; those of one project if it is named."""
    every = select(AuditLog)
    if only_project is not None:
        every = every.where(AuditLog.project_id == only_project)
    return paginate(session, every.where(*wanted.criteria()), model=AuditLog, query=query, cursors=every)
