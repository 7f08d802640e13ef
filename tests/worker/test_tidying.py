"""Bytes that nobody will ask for again."""

from __future__ import annotations

import io
import os
from datetime import timedelta

import pytest
from sqlalchemy import select

from api.database import new_id, now
from api.files.models import File
from api.jobs.models import ENDED, JobStatus
from api.uploads.models import Upload, UploadPart, UploadStatus
from tests.worker.support import Service, chat_rows
from worker.sweeping import sweep
from worker.tidying import ORPHAN_AGE, tidy

PAST = timedelta(seconds=-1)


def stored(service: Service) -> set[str]:
    return {path.name for path in service.settings.storage_dir.iterdir()}


def expire(service: Service, file_id: str, *, after: timedelta = PAST) -> None:
    with service.sessions.begin() as session:
        session.execute(select(File).where(File.id == file_id)).scalar_one().expires_at = now() + after


def test_expired_files_are_removed(any_service: Service) -> None:
    gone, later, ever = (any_service.add_file(chat_rows(1)) for _ in range(3))
    expire(any_service, gone)
    expire(any_service, later, after=timedelta(hours=1))

    sweep(any_service.resources())

    assert stored(any_service) == {later, ever}
    with any_service.sessions() as session:
        assert session.execute(select(File).where(File.id == gone)).scalar_one().deleted_at is not None


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("which", ["training_file", "validation_file"])
def test_a_file_of_an_unfinished_job_is_kept(any_service: Service, status: JobStatus, which: str) -> None:
    job = any_service.job(any_service.add_job(status=status, validation=chat_rows(2)))
    file_id = getattr(job, which)
    expire(any_service, file_id)

    sweep(any_service.resources())

    assert (file_id in stored(any_service)) == (status not in ENDED)


def add_upload(service: Service, *, expires: timedelta, status: UploadStatus = UploadStatus.PENDING) -> str:
    part = new_id("part_")
    service.storage.write(part, io.BytesIO(b"abc"), max_bytes=10)
    with service.sessions.begin() as session:
        upload = Upload(
            id=new_id("upload_"),
            project_id=service.project.id,
            filename="rows.jsonl",
            purpose="fine-tune",
            mime_type="text/jsonl",
            bytes=6,
            status=status,
            expires_at=now() + expires,
        )
        session.add(upload)
        session.flush()
        session.add(UploadPart(id=part, upload_id=upload.id, bytes=3, storage_key=part))
    return part


def test_expired_uploads_lose_their_parts(any_service: Service) -> None:
    add_upload(any_service, expires=PAST)
    kept = add_upload(any_service, expires=timedelta(hours=1))

    sweep(any_service.resources())

    assert stored(any_service) == {kept}
    with any_service.sessions() as session:
        assert list(session.scalars(select(Upload.status).order_by(Upload.seq))) == ["expired", "pending"]
        assert list(session.scalars(select(UploadPart.storage_key))) == [kept]


def test_what_no_row_names_is_removed_when_it_is_old(any_service: Service) -> None:
    file_id, part = any_service.add_file(chat_rows(1)), add_upload(any_service, expires=timedelta(hours=1))
    for name in ("file-orphan", ".file-torn.0123456789abcdef.part", "file-new", ".file-new.0123456789abcdef.part"):
        (any_service.settings.storage_dir / name).write_bytes(b"abc")
    (any_service.settings.storage_dir / "lost+found.txt").write_bytes(b"not ours")
    long_ago = (now() - ORPHAN_AGE - timedelta(minutes=1)).timestamp()
    for name in stored(any_service):
        if "new" not in name:
            os.utime(any_service.settings.storage_dir / name, (long_ago, long_ago))

    tidy(any_service.resources())

    new = {"file-new", ".file-new.0123456789abcdef.part"}
    assert stored(any_service) == {file_id, part, "lost+found.txt", *new}
