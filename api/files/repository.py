"""Queries of files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Select, exists, or_, select
from sqlalchemy.orm import Session

from api.database import now
from api.errors import FileNotFound
from api.files.models import File
from api.jobs.models import ENDED, Job
from api.reports.repository import drop_reports
from api.repository import Repository


class FileRepository(Repository[File]):
    """Files of one project."""

    model = File
    missing = FileNotFound
    noun = "file"

    def visible(self) -> Select[File]:
        """All but the deleted and the expired ones."""
        return self.every().where(File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > now()))

    def get_kept(self, file_id: str) -> File:
        """A file whose bytes are there, expired or not: a job that took it in time may read it to its end.

        Raises:
            FileNotFound: there is none in this project.
        """
        file = self.session.scalar(self.every().where(File.id == file_id, File.deleted_at.is_(None)))
        if file is None:
            raise FileNotFound(f"No such file: {file_id!r}.")
        return file

    def lock(self, file_id: str, *, shared: bool = False, param: str | None = None) -> File:
        """The row, locked until the transaction ends: no job may start to use a file while it is deleted.

        Args:
            file_id: which file.
            shared: whether others may have the same lock; for those who use the file, not those who delete it.
            param: the parameter to blame if there is none.

        Raises:
            FileNotFound: there is none in this project.
        """
        statement = self.visible().where(File.id == file_id).with_for_update(read=shared)
        file = self.session.scalar(statement)
        if file is None:
            raise FileNotFound(f"No such file: {file_id!r}.", param=param)
        return file


def lock_expired(session: Session, *, moment: datetime, limit: int) -> Sequence[File]:
    """Files of all projects that expired before ``moment`` and that no unfinished job reads, locked."""
    expired = select(File).where(File.deleted_at.is_(None), File.expires_at <= moment)
    found = session.scalars(expired.where(~_is_needed()).limit(limit).with_for_update(skip_locked=True, of=File)).all()
    # Once more, now that they are locked: a job may have come in between.
    needed = set(session.scalars(select(File.id).where(File.id.in_([file.id for file in found]), _is_needed())))
    return [file for file in found if file.id not in needed]


def _is_needed() -> ColumnElement[bool]:
    """Criterion: an unfinished job reads the file."""
    reads = or_(Job.training_file == File.id, Job.validation_file == File.id)
    return exists(select(Job.id).where(reads, Job.status.not_in(list(ENDED))).correlate(File))


def mark_deleted(session: Session, file: File) -> None:
    """Forget a file, which the caller has locked, and what was found in it. Its bytes are the caller's to remove."""
    file.deleted_at = now()
    drop_reports(session, file.id)


def known_keys(session: Session, keys: Sequence[str]) -> set[str]:
    """Which of these storage keys are a file's whose bytes are to be there."""
    return set(session.scalars(select(File.storage_key).where(File.storage_key.in_(keys), File.deleted_at.is_(None))))
