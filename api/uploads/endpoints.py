"""``/v1/uploads``: files in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, BinaryIO

from fastapi import Depends, Request

from api.auth import CallerDep
from api.dependencies import ResourcesDep, SessionDep, WorkDep
from api.files.upload import multipart_body, receive_file
from api.quotas.dependencies import RoomDep
from api.routing import Router
from api.uploads import service
from api.uploads.schemas import UploadComplete, UploadCreate, UploadObject, UploadPartObject

router = Router(prefix="/uploads", tags=["files"])


def check_pending(upload_id: str, caller: CallerDep, resources: ResourcesDep, _room: RoomDep) -> None:
    """Refuse a part before its bytes are read, where that can be known."""
    with resources.read_sessions() as session:
        service.get_pending(session, caller, upload_id)


async def receive_part(request: Request, _pending: Annotated[None, Depends(check_pending)]) -> AsyncIterator[BinaryIO]:
    """A part's bytes, from its form.

    Raises:
        InvalidRequest: not multipart, or no part ``data`` in it.
    """
    async with receive_file(request, name="data") as (_form, received):
        yield received.file


PartDep = Annotated[BinaryIO, Depends(receive_part)]


@router.post("")
def create_upload(body: UploadCreate, caller: CallerDep, session: SessionDep, resources: ResourcesDep) -> UploadObject:
    """Announce a file that will come in parts."""
    max_bytes = resources.settings.max_large_upload_bytes
    return UploadObject.of(service.create(session, caller, body=body, max_bytes=max_bytes))


@router.post("/{upload_id}/parts", openapi_extra=multipart_body(name="data"))
def create_part(
    upload_id: str, caller: CallerDep, received: PartDep, work: WorkDep, resources: ResourcesDep
) -> UploadPartObject:
    """Add a part. What it belongs to is looked for before it is read, hence before the work, which reads it too."""
    part = service.add_part(
        work,
        caller,
        upload_id=upload_id,
        source=received,
        storage=resources.storage,
        max_bytes=resources.settings.max_part_bytes,
    )
    return UploadPartObject.of(part)


@router.post("/{upload_id}/complete")
def complete_upload(
    upload_id: str, body: UploadComplete, caller: CallerDep, work: WorkDep, resources: ResourcesDep
) -> UploadObject:
    """Put the parts together in the given order: a file."""
    storage = resources.storage
    with resources.read_sessions() as session:
        joined = service.join(session, caller, upload_id=upload_id, body=body, storage=storage)
    upload, file = service.complete(work, caller, upload_id=upload_id, joined=joined, storage=storage)
    return UploadObject.of(upload, file)


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, caller: CallerDep, work: WorkDep, resources: ResourcesDep) -> UploadObject:
    """Forget the parts."""
    return UploadObject.of(service.cancel(work, caller, upload_id, storage=resources.storage))
