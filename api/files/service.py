"""What can be done with files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import new_id, now
from api.errors import FileInUse
from api.files.models import File, FileStatus
from api.files.repository import FileRepository, mark_deleted
from api.files.schemas import Purpose
from api.files.upload import Upload
from api.jobs.repository import JobRepository
from api.pagination import Page, PageQuery
from api.quotas import service as quotas
from api.reports import service as reports
from api.storage import ObjectStore, StoredObject
from api.unit_of_work import UnitOfWork
from uora.data.report import DatasetReport

#: A training file of so many bytes is looked into while its upload is answered; a larger one by a worker.
CHECKED_AT_ONCE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class StoredContent:
    """Bytes in the object store that are to become a file, and what was found in them."""

    key: str
    stored: StoredObject
    #: None where nobody has looked yet.
    report: DatasetReport | None


def create(work: UnitOfWork, caller: Caller, *, upload: Upload, storage: ObjectStore, max_bytes: int) -> File:
    """Store the content and then the row; the content goes again if the row does not come to be.

    Raises:
        TooLarge: the content has more than ``max_bytes``.
        StorageQuotaExceeded: the project may not have as much.
    """
    file_id = new_file_id()
    stored = storage.write(file_id, upload.source, max_bytes=max_bytes)
    work.on_rollback(partial(storage.delete, file_id))
    content = check_content(file_id, stored, purpose=upload.form.purpose, storage=storage)
    quotas.check_bytes(work.session, caller, added=stored.bytes)
    return add(
        work,
        caller,
        content=content,
        filename=upload.filename,
        purpose=upload.form.purpose,
        seconds=upload.form.expires_after.seconds if upload.form.expires_after else None,
    )


def new_file_id() -> str:
    """The id of a new file, and the key of its bytes."""
    return new_id("file-")


def check_content(key: str, stored: StoredObject, *, purpose: str, storage: ObjectStore) -> StoredContent:
    """Look into a small training file at once, before a transaction begins; a trainer's file of another size waits."""
    report = None
    if purpose == Purpose.FINE_TUNE and stored.bytes <= CHECKED_AT_ONCE_BYTES:
        report = reports.check_at_once(key, storage)
    return StoredContent(key, stored, report)


def add(
    work: UnitOfWork, caller: Caller, *, content: StoredContent, filename: str, purpose: str, seconds: int | None
) -> File:
    """Insert the row of a content, kept for so many ``seconds``; a training file that nobody has looked into is
    handed to a worker."""
    moment = now()
    file = FileRepository(work.session, caller.project_id).add(
        File(
            id=content.key,
            project_id=caller.project_id,
            filename=filename,
            purpose=purpose,
            bytes=content.stored.bytes,
            sha256=content.stored.sha256,
            storage_key=content.key,
            status=FileStatus.PROCESSED,
            created_at=moment,
            expires_at=None if seconds is None else moment + timedelta(seconds=seconds),
        )
    )
    if purpose == Purpose.FINE_TUNE:
        reports.add_check(work, file, found=content.report)
    return file


def list_files(session: Session, caller: Caller, *, query: PageQuery, purpose: str | None) -> Page[File]:
    """A page of the project's files, or of those with one purpose."""
    criteria = () if purpose is None else (File.purpose == purpose,)
    return FileRepository(session, caller.project_id).page(query, *criteria)


def get(session: Session, caller: Caller, file_id: str) -> File:
    """One file; raises ``FileNotFound``."""
    return FileRepository(session, caller.project_id).get(file_id)


def delete(work: UnitOfWork, caller: Caller, file_id: str, *, storage: ObjectStore) -> File:
    """Delete a file that no unfinished job needs; its bytes go once the row says so.

    Raises:
        FileNotFound: there is none in the project.
        FileInUse: a job has yet to read it.
    """
    file = FileRepository(work.session, caller.project_id).lock(file_id)
    job = JobRepository(work.session, caller.project_id).find_unfinished_using(file_id)
    if job is not None:
        raise FileInUse(
            f"The file {file_id} is needed by the job {job.id}, which is {job.status}; "
            "cancel the job or wait for its end."
        )
    mark_deleted(work.session, file)
    work.on_commit(partial(storage.delete, file.storage_key))
    return file
