"""Receiving an adapter: after the key was checked, within the limits, without a database session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, BinaryIO, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from api.files.upload import parse_fields, receive_file
from api.jobs.schemas import Suffix
from api.quotas.dependencies import RoomDep


class AdapterForm(BaseModel):
    """The fields of an upload beside the file itself."""

    model_config = ConfigDict(extra="forbid")

    base_model: str = Field(min_length=1)
    suffix: Suffix | None = None
    #: Of a PEFT folder, which does not say; ours say it themselves.
    task: Literal["chat", "completion"] = "chat"


@dataclass(frozen=True)
class AdapterUpload:
    """One received adapter, at its beginning."""

    source: BinaryIO
    form: AdapterForm


async def receive_adapter(request: Request, _room: RoomDep) -> AsyncIterator[AdapterUpload]:
    """Parse the body, which is spooled to a temporary file that ends with the request.

    Raises:
        InvalidRequest: not multipart, no file in it, or a field that cannot be used.
    """
    async with receive_file(request, "base_model") as (form, file):
        yield AdapterUpload(source=file.file, form=parse_fields(form, AdapterForm))


AdapterUploadDep = Annotated[AdapterUpload, Depends(receive_adapter)]
