"""Files that arrive in parts. The bytes of a part lie in the object store until the parts are put together."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class UploadStatus(StrEnum):
    """OpenAI's states of an upload."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Upload(Base, Listed):
    """What was announced: parts of ``bytes`` in all, before ``expires_at``."""

    __tablename__ = "uploads"
    __table_args__ = (Index(None, "status", "expires_at"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(default=UploadStatus.PENDING)
    expires_at: Mapped[datetime]
    #: For how long the file will be kept; None for ever.
    file_seconds: Mapped[int | None]
    #: The file, once it is completed.
    file_id: Mapped[str | None]


class UploadPart(Base, Listed):
    """A piece of a pending upload."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    storage_key: Mapped[str] = mapped_column(unique=True)
