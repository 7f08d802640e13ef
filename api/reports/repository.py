"""Queries of reports: those of a project, and the row-level moves that the worker makes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.database import database_now, new_id, now
from api.files.models import File, FileStatus
from api.reports.models import FileReport, ReportStatus
from api.reports.schemas import ReportRequest
from api.repository import Repository
from uora.data.report import DatasetReport


class ReportRepository(Repository[FileReport]):
    """Reports on one project's files."""

    model = FileReport
    noun = "report"

    def find_same(self, file_id: str, request: ReportRequest) -> FileReport | None:
        """The report that answers the same request."""
        return self.session.scalar(self.visible().where(FileReport.file_id == file_id, FileReport.key == request.key))

    def find_made(self, file_id: str, request: ReportRequest) -> FileReport | None:
        """A report that says all that is asked, and perhaps more: one that was made for an estimate."""
        says_it = FileReport.rows_key if request.adapter is None else FileReport.key
        made = self.visible().where(FileReport.file_id == file_id, says_it == request.key)
        return self.session.scalar(made.where(FileReport.status == ReportStatus.COMPLETED).limit(1))

    def add_queued(self, file_id: str, request: ReportRequest) -> tuple[FileReport, bool]:
        """The report that answers the request, and whether it is a new one: another may have asked meanwhile."""
        try:
            with self.session.begin_nested():
                return self.add(new_report(self.project_id, file_id, request)), True
        except IntegrityError:
            found = self.find_same(file_id, request)
            if found is None:
                raise
            return found, False


def new_report(project_id: str, file_id: str, request: ReportRequest) -> FileReport:
    """A row that is not in the session."""
    return FileReport(
        id=new_id("filerep-"),
        project_id=project_id,
        file_id=file_id,
        request=request.model_dump(mode="json"),
        key=request.key,
        rows_key=request.rows.key,
        status=ReportStatus.QUEUED,
        created_at=now(),
    )


def claim(session: Session, report_id: str, *, ttl: timedelta) -> FileReport | None:
    """A queued report that nobody is making, from now on the caller's for ``ttl``."""
    moment = database_now(session)
    statement = (
        update(FileReport)
        .where(FileReport.id == report_id, FileReport.status == ReportStatus.QUEUED)
        .where(or_(FileReport.lease_until.is_(None), FileReport.lease_until < moment))
        .values(attempt=FileReport.attempt + 1, lease_until=moment + ttl)
    )
    if not _changed_one(session, statement):
        return None
    return session.scalar(select(FileReport).where(FileReport.id == report_id))


def finish(session: Session, claimed: FileReport, *, status: ReportStatus, **values: Any) -> bool:
    """Write down what came of a claim; False if it was somebody else's by then, or its file was deleted."""
    statement = (
        update(FileReport)
        .where(
            FileReport.id == claimed.id,
            FileReport.status == ReportStatus.QUEUED,
            FileReport.attempt == claimed.attempt,
        )
        .values(status=status, finished_at=now(), lease_until=None, **values)
    )
    return _changed_one(session, statement)


def set_file_status(session: Session, file_id: str, *, status: FileStatus, details: str | None) -> None:
    """What the check of a file came to."""
    statement = update(File).where(File.id == file_id, File.deleted_at.is_(None))
    session.execute(statement.values(status=status, status_details=details))


def find_rows(session: Session, claimed: FileReport) -> DatasetReport | None:
    """A report that was made of the same file, read in the same way, whatever was to be trained on it."""
    statement = select(FileReport.report).where(
        FileReport.file_id == claimed.file_id,
        FileReport.rows_key == claimed.rows_key,
        FileReport.status == ReportStatus.COMPLETED,
    )
    found = session.scalar(statement.limit(1))
    return None if found is None else DatasetReport.model_validate(found)


def list_waiting(session: Session, *, age: timedelta, limit: int) -> Sequence[str]:
    """Reports of all projects that were asked for so long ago, and that nobody is making."""
    moment = database_now(session)
    statement = select(FileReport.id).where(
        FileReport.status == ReportStatus.QUEUED,
        FileReport.created_at < moment - age,
        or_(FileReport.lease_until.is_(None), FileReport.lease_until < moment),
    )
    return session.scalars(statement.order_by(FileReport.seq).limit(limit)).all()


def drop_reports(session: Session, file_id: str) -> None:
    """Forget what was found in a file."""
    session.execute(delete(FileReport).where(FileReport.file_id == file_id))


def _changed_one(session: Session, statement: Any) -> bool:
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast(CursorResult[Any], result).rowcount == 1
