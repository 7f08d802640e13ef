"""Queries of uploads: those of a project, and those that the sweeper looks for in all projects."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from api.errors import UploadNotFound
from api.repository import Repository
from api.uploads.models import Upload, UploadPart, UploadStatus


class UploadRepository(Repository[Upload]):
    """Uploads of one project, with their parts."""

    model = Upload
    missing = UploadNotFound
    noun = "upload"

    def lock(self, upload_id: str) -> Upload:
        """The row, locked until the transaction ends: parts are added one after the other, and none after its end.

        Raises:
            UploadNotFound: there is none in this project.
        """
        self.get(upload_id)
        locked = self.visible().where(Upload.id == upload_id).with_for_update()
        return self.session.execute(locked.execution_options(populate_existing=True)).scalar_one()

    def parts(self, upload: Upload) -> Sequence[UploadPart]:
        """In the order of their arrival."""
        return parts_of(self.session, upload)

    def part_bytes(self, upload: Upload) -> int:
        """Of all parts together."""
        total = select(func.coalesce(func.sum(UploadPart.bytes), 0)).where(UploadPart.upload_id == upload.id)
        return int(self.session.execute(total).scalar_one())

    def drop_parts(self, upload: Upload) -> list[str]:
        """Forget the parts; returns the storage keys of their bytes."""
        return drop_parts(self.session, upload)


def parts_of(session: Session, upload: Upload) -> Sequence[UploadPart]:
    """In the order of their arrival."""
    of_upload = select(UploadPart).where(UploadPart.upload_id == upload.id)
    return session.scalars(of_upload.order_by(UploadPart.seq)).all()


def drop_parts(session: Session, upload: Upload) -> list[str]:
    """Forget an upload's parts; returns the storage keys of their bytes."""
    keys = [part.storage_key for part in parts_of(session, upload)]
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
    return keys


def lock_expired(session: Session, *, moment: datetime, limit: int) -> Sequence[Upload]:
    """Pending uploads of all projects that expired before ``moment``, locked."""
    expired = select(Upload).where(Upload.status == UploadStatus.PENDING, Upload.expires_at <= moment)
    return session.scalars(expired.limit(limit).with_for_update(skip_locked=True)).all()


def known_keys(session: Session, keys: Sequence[str]) -> set[str]:
    """Which of these storage keys are a part's."""
    return set(session.scalars(select(UploadPart.storage_key).where(UploadPart.storage_key.in_(keys))))
