"""Receiving a multipart upload: after the key was checked, within the limits, without a database session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from api.auth import CallerDep
from api.errors import InvalidRequest
from api.files.schemas import FileCreate
from api.handlers import explain

#: A raw-bytes upload has no name of its own; this is the one that OpenAI's client sends.
UNNAMED = "upload"
MAX_FILENAME_LENGTH = 255


@dataclass(frozen=True)
class ReceivedFile:
    """One received file, at its beginning."""

    source: BinaryIO
    filename: str


@dataclass(frozen=True)
class Upload(ReceivedFile):
    """A file and the fields beside it."""

    form: FileCreate


async def receive_upload(request: Request, _caller: CallerDep) -> AsyncIterator[Upload]:
    """A new file, from its form.

    Raises:
        InvalidRequest: not multipart, no file in it, or a field that cannot be used.
    """
    async with receive_form(request, "file") as (received, form):
        yield Upload(received.source, received.filename, _parse_fields(form))


UploadDep = Annotated[Upload, Depends(receive_upload)]


@asynccontextmanager
async def receive_form(request: Request, name: str) -> AsyncIterator[tuple[ReceivedFile, FormData]]:
    """Parse the body: its file ``name`` is spooled to a temporary file without a name, which ends with the block.

    Raises:
        InvalidRequest: not multipart, or no such file in it.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequest(f"Expected a multipart/form-data body with the part {name!r}.", param=name)
    async with request.form(max_files=1, max_fields=16) as form:
        file = form.get(name)
        if not isinstance(file, UploadFile):
            raise InvalidRequest(
                f"Missing the part {name!r} with the content and a filename.",
                param=name,
                code="missing_required_parameter",
            )
        yield ReceivedFile(file.file, safe_name(file.filename)), form


def _parse_fields(form: FormData) -> FileCreate:
    fields = _unbracket({name: value for name, value in form.multi_items() if name != "file"})
    try:
        return FileCreate.model_validate(fields)
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
