"""What can be done with uploads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import BinaryIO, Final

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import new_id, now
from api.errors import InvalidRequest, TooLarge, UploadNotPending
from api.files import service as files
from api.files.models import File
from api.files.repository import FileRepository
from api.files.service import StoredContent
from api.files.upload import safe_name
from api.quotas import service as quotas
from api.storage import ObjectStore
from api.unit_of_work import UnitOfWork
from api.uploads.models import Upload, UploadPart, UploadStatus
from api.uploads.repository import UploadRepository
from api.uploads.schemas import UploadComplete, UploadCreate

#: From its creation to its end, unless it is completed.
LIFETIME: Final = timedelta(hours=1)


@dataclass(frozen=True)
class Joined:
    """What the parts came to, in the object store, with no row yet."""

    content: StoredContent
    part_ids: tuple[str, ...]


def create(session: Session, caller: Caller, *, body: UploadCreate, max_bytes: int) -> Upload:
    """Announce a file.

    Raises:
        TooLarge: it would have more than ``max_bytes``.
        StorageQuotaExceeded: the project may not have as much. Nothing is kept for it: its parts are checked again.
    """
    if body.bytes > max_bytes:
        raise TooLarge(f"Found {body.bytes} bytes; expected at most {max_bytes}. Split the file.", param="bytes")
    quotas.check_bytes(session, caller, added=body.bytes)
    moment = now()
    return UploadRepository(session, caller.project_id).add(
        Upload(
            id=new_id("upload_"),
            project_id=caller.project_id,
            filename=safe_name(body.filename),
            purpose=body.purpose,
            mime_type=body.mime_type,
            bytes=body.bytes,
            status=UploadStatus.PENDING,
            created_at=moment,
            expires_at=moment + LIFETIME,
            file_seconds=body.expires_after and body.expires_after.seconds,
        )
    )


def get_pending(session: Session, caller: Caller, upload_id: str) -> Upload:
    """An upload that takes parts.

    Raises:
        UploadNotFound: there is none in the project.
        UploadNotPending: it was completed or cancelled, or has expired.
    """
    upload = UploadRepository(session, caller.project_id).get(upload_id)
    _check_pending(upload)
    return upload


def add_part(
    work: UnitOfWork, caller: Caller, *, upload_id: str, source: BinaryIO, storage: ObjectStore, max_bytes: int
) -> UploadPart:
    """Store a part and then its row.

    Raises:
        UploadNotFound: there is no such upload in the project.
        UploadNotPending: it takes no parts any more.
        TooLarge: the part has more than ``max_bytes``.
        StorageQuotaExceeded: the project may not have as much.
        InvalidRequest: it is empty, or one too many for the announced bytes.
    """
    part_id = new_id("part_")
    stored = storage.write(part_id, source, max_bytes=max_bytes)
    work.on_rollback(partial(storage.delete, part_id))
    uploads = UploadRepository(work.session, caller.project_id)
    upload = uploads.lock(upload_id)
    _check_pending(upload)
    total = uploads.part_bytes(upload) + stored.bytes
    if not stored.bytes or total > upload.bytes:
        raise InvalidRequest(
            f"With this part of {stored.bytes} bytes the upload {upload.id} has {total}; expected {upload.bytes} in "
            "all, as was announced, and no empty part.",
            param="data",
        )
    quotas.check_bytes(work.session, caller, added=stored.bytes)
    part = UploadPart(id=part_id, upload_id=upload.id, bytes=stored.bytes, storage_key=part_id, created_at=now())
    work.session.add(part)
    work.session.flush()
    return part


def join(
    session: Session, caller: Caller, *, upload_id: str, body: UploadComplete, storage: ObjectStore
) -> Joined | None:
    """Put the parts together in the object store; None if the upload was completed before.

    For minutes, where the file is large: so no row is locked, and `complete` looks again.

    Raises:
        UploadNotFound: there is no such upload in the project.
        UploadNotPending: it was cancelled, or has expired.
        InvalidRequest: the parts are not this upload's, or not what was announced.
    """
    uploads = UploadRepository(session, caller.project_id)
    upload = uploads.get(upload_id)
    if upload.status == UploadStatus.COMPLETED:
        return None
    _check_pending(upload)
    parts = _in_order(upload, uploads.parts(upload), body.part_ids)
    session.close()  # nothing more is read, and no snapshot has to be kept meanwhile
    file_id = files.new_file_id()
    with ExitStack() as stack:
        stack.callback(storage.delete, file_id)
        with _Concatenation(storage, [part.storage_key for part in parts]) as source:
            stored = storage.write(file_id, source, max_bytes=upload.bytes)
        _check_md5(source.md5, body.md5)
        content = files.check_content(file_id, stored, purpose=upload.purpose, storage=storage)
        stack.pop_all()
    return Joined(content, tuple(body.part_ids))


def complete(
    work: UnitOfWork, caller: Caller, *, upload_id: str, joined: Joined | None, storage: ObjectStore
) -> tuple[Upload, File]:
    """Make a file of what was joined; twice is as good as once, for clients that did not get the answer.

    Raises:
        UploadNotFound: there is no such upload in the project.
        UploadNotPending: it was cancelled, or has expired.
        FileNotFound: it was completed before, and its file was deleted.
    """
    if joined is not None:
        work.on_rollback(partial(storage.delete, joined.content.key))
    uploads = UploadRepository(work.session, caller.project_id)
    upload = uploads.lock(upload_id)
    if upload.file_id is not None:
        if joined is not None:
            work.on_commit(partial(storage.delete, joined.content.key))
        return upload, FileRepository(work.session, caller.project_id).get(upload.file_id)
    _check_pending(upload)
    if joined is None:
        raise RuntimeError(f"{upload.id} is {upload.status} and was completed a moment ago")
    file = files.add(
        work,
        caller,
        content=joined.content,
        filename=upload.filename,
        purpose=upload.purpose,
        seconds=upload.file_seconds,
    )
    upload.status, upload.file_id = UploadStatus.COMPLETED, file.id
    _drop_parts(work, uploads, upload, storage)
    return upload, file


def cancel(work: UnitOfWork, caller: Caller, upload_id: str, *, storage: ObjectStore) -> Upload:
    """Forget the parts of an upload; twice is as good as once.

    Raises:
        UploadNotFound: there is none in the project.
        UploadNotPending: it was completed, or has expired.
    """
    uploads = UploadRepository(work.session, caller.project_id)
    upload = uploads.lock(upload_id)
    if upload.status != UploadStatus.CANCELLED:
        _check_pending(upload)
        upload.status = UploadStatus.CANCELLED
        _drop_parts(work, uploads, upload, storage)
    return upload


class _Concatenation:
    """The bytes of several objects, one after the other, and their MD5."""

    def __init__(self, storage: ObjectStore, keys: Sequence[str]) -> None:
        self._storage = storage
        self._keys = list(reversed(keys))
        self._open: BinaryIO | None = None
        self._md5 = hashlib.md5(usedforsecurity=False)

    def __enter__(self) -> _Concatenation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.close()

    @property
    def md5(self) -> str:
        """Of what was read."""
        return self._md5.hexdigest()

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""
        while True:
            if self._open is None:
                if not self._keys:
                    return b""
                self._open = self._storage.open(self._keys.pop())
            if chunk := self._open.read(size):
                self._md5.update(chunk)
                return chunk
            self._open.close()
            self._open = None


def _check_pending(upload: Upload) -> None:
    status = upload.status
    if status == UploadStatus.PENDING and upload.expires_at <= now():
        status = UploadStatus.EXPIRED
    if status != UploadStatus.PENDING:
        raise UploadNotPending(f"The upload {upload.id} is {status}; create a new one.")


def _in_order(upload: Upload, parts: Sequence[UploadPart], part_ids: Sequence[str]) -> list[UploadPart]:
    known = {part.id: part for part in parts}
    for part_id in part_ids:
        if part_id not in known:
            raise InvalidRequest(f"The upload {upload.id} has no part {part_id!r}.", param="part_ids")
    if len(set(part_ids)) < len(part_ids):
        raise InvalidRequest("Found a part twice; expected each once, in the file's order.", param="part_ids")
    chosen = [known[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in chosen)
    if total != upload.bytes:
        raise InvalidRequest(
            f"The named parts have {total} bytes; expected {upload.bytes}, as was announced. Name all parts, or add "
            "those that are missing.",
            param="part_ids",
        )
    return chosen


def _check_md5(found: str, expected: str | None) -> None:
    if expected is not None and found != expected.lower():
        raise InvalidRequest(
            f"The parts have the MD5 {found}; expected {expected}. Check their order, or send them again.",
            param="md5",
            code="checksum_mismatch",
        )


def _drop_parts(work: UnitOfWork, uploads: UploadRepository, upload: Upload, storage: ObjectStore) -> None:
    for key in uploads.drop_parts(upload):
        work.on_commit(partial(storage.delete, key))
