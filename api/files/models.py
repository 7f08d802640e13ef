"""Uploaded files; their bytes lie in the object store under ``storage_key``."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class FileStatus(StrEnum):
    """OpenAI's states of a file."""

    #: Nobody has looked into it yet.
    UPLOADED = "uploaded"
    PROCESSED = "processed"
    #: It has problems; ``status_details`` names the first.
    ERROR = "error"


class File(Base, Listed):
    """One uploaded file."""

    __tablename__ = "files"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    storage_key: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str] = mapped_column(default=FileStatus.PROCESSED)
    status_details: Mapped[str | None]
    #: From then on it is gone for its users; its bytes go once no unfinished job needs them.
    expires_at: Mapped[datetime | None] = mapped_column(index=True)
    #: A deleted file keeps its row, without bytes: jobs name it, and a client that deletes while it pages
    #: still has it as its cursor.
    deleted_at: Mapped[datetime | None]
