"""Receiving a multipart upload: after the key was checked, within the limits, without a database session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from api.errors import InvalidRequest
from api.files.schemas import FileCreate
from api.handlers import explain
from api.quotas.dependencies import RoomDep

M = TypeVar("M", bound=BaseModel)

#: A raw-bytes upload has no name of its own; this is the one that OpenAI's client sends.
UNNAMED = "upload"
MAX_FILENAME_LENGTH = 255


@dataclass(frozen=True)
class Upload:
    """One received file, at its beginning, and the fields beside it."""

    source: BinaryIO
    filename: str
    form: FileCreate


async def receive_upload(request: Request, _room: RoomDep) -> AsyncIterator[Upload]:
    """Parse the body, which is spooled to a temporary file that ends with the request.

    Raises:
        InvalidRequest: not multipart, no file in it, or a field that cannot be used.
    """
    async with receive_file(request, "purpose") as (form, file):
        yield Upload(source=file.file, filename=safe_name(file.filename), form=parse_fields(form, FileCreate))


UploadDep = Annotated[Upload, Depends(receive_upload)]


def multipart_body(*required: str, name: str = "file", **fields: dict[str, Any]) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes a file ``name`` and ``fields``, some of them ``required``, in a multipart
    body."""
    schema = {
        "type": "object",
        "required": [name, *required],
        "properties": {name: {"type": "string", "format": "binary"}, **fields},
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@asynccontextmanager
async def receive_file(
    request: Request, *fields: str, name: str = "file"
) -> AsyncIterator[tuple[FormData, UploadFile]]:
    """A multipart body and its one file ``name``; ``fields`` are what else is expected.

    The file is spooled to a temporary one without a name, which ends with the block.

    Raises:
        InvalidRequest: not multipart, or no file in it.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        parts = " and ".join(map(repr, (name, *fields)))
        raise InvalidRequest(f"Expected a multipart/form-data body with {parts}.")
    async with request.form(max_files=1, max_fields=16) as form:
        file = form.get(name)
        if not isinstance(file, UploadFile):
            raise InvalidRequest(
                f"Missing the part {name!r} with the content and a filename.",
                param=name,
                code="missing_required_parameter",
            )
        yield form, file


def parse_fields(form: FormData, model: type[M]) -> M:
    """The parts beside the file; raises ``InvalidRequest`` for one that cannot be used."""
    fields = _unbracket({name: value for name, value in form.multi_items() if name != "file"})
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        raise explain(errors, body=fields) from error


def _unbracket(form: dict[str, Any]) -> dict[str, Any]:
    """``{"a[b]": 1}`` -> ``{"a": {"b": 1}}``, as OpenAI's client writes nested fields."""
    fields: dict[str, Any] = {}
    for name, value in form.items():
        outer, bracket, inner = name.partition("[")
        if bracket and inner.endswith("]") and isinstance(fields.setdefault(outer, {}), dict):
            fields[outer][inner[:-1]] = value
        else:
            fields[name] = value
    return fields


def safe_name(filename: str | None) -> str:
    """The last part of a name, without what a terminal or a header could trip over."""
    name = PurePosixPath((filename or "").replace("\\", "/")).name
    return "".join(letter for letter in name if letter.isprintable())[:MAX_FILENAME_LENGTH] or UNNAMED
