"""What can be done with files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import new_id, now
from api.errors import FileInUse
from api.files.models import File
from api.files.repository import FileRepository
from api.files.upload import Upload
from api.jobs.repository import JobRepository
from api.pagination import Page, PageQuery
from api.storage import CHUNK_BYTES, ObjectStore
from api.unit_of_work import UnitOfWork


def create(work: UnitOfWork, caller: Caller, *, upload: Upload, storage: ObjectStore, max_bytes: int) -> File:
    """Store the content and then the row; the content goes again if the row does not come to be.

    Raises:
        TooLarge: the content has more than ``max_bytes``.
    """
    file_id = new_id("file-")
    stored = storage.write(file_id, upload.source, max_bytes=max_bytes)
    work.on_rollback(partial(storage.delete, file_id))
    return FileRepository(work.session, caller.project_id).add(
        File(
            id=file_id,
            project_id=caller.project_id,
            filename=upload.filename,
            purpose=upload.form.purpose,
            bytes=stored.bytes,
            sha256=stored.sha256,
            storage_key=file_id,
            status="processed",
            created_at=now(),
        )
    )


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
    file.deleted_at = now()
    work.on_commit(partial(storage.delete, file.storage_key))
    return file


def read_chunks(source: BinaryIO) -> Iterator[bytes]:
    """The content in pieces; closes ``source`` at the end."""
    with source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
