"""What was found in files: a report for each question, made once."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class ReportStatus(StrEnum):
    """How far it is."""

    QUEUED = "queued"
    COMPLETED = "completed"
    #: It could not be made, which says nothing about the file.
    FAILED = "failed"


class FileReport(Base, Listed):
    """A report on one file. ``attempt`` is the fencing number, as of jobs."""

    __tablename__ = "file_reports"
    __table_args__ = (UniqueConstraint("file_id", "key"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), index=True)
    #: ``api.reports.schemas.ReportRequest``.
    request: Mapped[dict[str, Any]]
    key: Mapped[str] = mapped_column(String(64))
    #: Equal where the rows are read alike, whatever is trained on them.
    rows_key: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(default=ReportStatus.QUEUED, index=True)
    #: ``uora.data.DatasetReport``.
    report: Mapped[dict[str, Any] | None]
    #: ``uora.sizing.Footprint`` of the adapter that the request names.
    footprint: Mapped[dict[str, Any] | None]
    #: {"code", "message", "param"} when failed.
    error: Mapped[dict[str, Any] | None]
    finished_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None]
