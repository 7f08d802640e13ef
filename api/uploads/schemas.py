"""Uploads on the wire."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from api.files.models import File
from api.files.schemas import ExpiresAfter, FileObject, Purpose
from api.uploads.models import Upload, UploadPart

#: More parts than fit: the largest upload in parts of a megabyte.
MAX_PARTS = 8192


class UploadCreate(BaseModel):
    """What will come."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1)
    mime_type: str = Field(min_length=1, max_length=255)
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class UploadComplete(BaseModel):
    """The parts in their order, and what they should come to."""

    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_PARTS)]
    #: Of the whole file, in hexadecimal digits.
    md5: str | None = Field(default=None, pattern="^[0-9a-fA-F]{32}$")


class UploadObject(BaseModel):
    """OpenAI's upload."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None = None

    @classmethod
    def of(cls, upload: Upload, file: File | None = None) -> Self:
        """Show a row, and the file that became of it."""
        return cls(
            id=upload.id,
            bytes=upload.bytes,
            created_at=int(upload.created_at.timestamp()),
            expires_at=int(upload.expires_at.timestamp()),
            filename=upload.filename,
            purpose=upload.purpose,
            status=upload.status,
            file=None if file is None else FileObject.of(file),
        )


class UploadPartObject(BaseModel):
    """OpenAI's part."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, part: UploadPart) -> Self:
        """Show a row."""
        return cls(id=part.id, created_at=int(part.created_at.timestamp()), upload_id=part.upload_id)
