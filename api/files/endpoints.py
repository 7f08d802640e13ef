"""``/v1/files``"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends
from starlette.responses import FileResponse

from api.auth import CallerDep
from api.dependencies import PageParams, ReadSessionDep, ResourcesDep, WorkDep
from api.files import service
from api.files.schemas import FileDeleted, FileObject, Purpose
from api.files.upload import UploadDep, multipart_body
from api.pagination import ListObject, PageQuery
from api.routing import Router

router = Router(prefix="/files", tags=["files"])

AnyPurpose = Purpose | Literal["fine-tune-results"]
FilePage = Annotated[PageQuery, Depends(PageParams(default_limit=10_000, max_limit=10_000))]

_UPLOAD_BODY = multipart_body("purpose", purpose={"type": "string", "enum": [purpose.value for purpose in Purpose]})


@router.post("", openapi_extra=_UPLOAD_BODY)
def create_file(caller: CallerDep, upload: UploadDep, work: WorkDep, resources: ResourcesDep) -> FileObject:
    """Upload a file. It is received, or refused, before the work, which would read it too."""
    file = service.create(
        work,
        caller,
        upload=upload,
        storage=resources.storage,
        max_bytes=resources.settings.max_upload_bytes,
    )
    return FileObject.of(file)


@router.get("")
def list_files(
    caller: CallerDep,
    session: ReadSessionDep,
    query: FilePage,
    purpose: AnyPurpose | None = None,
) -> ListObject[FileObject]:
    """List the project's files."""
    return ListObject.of(service.list_files(session, caller, query=query, purpose=purpose), FileObject.of)


@router.get("/{file_id}")
def get_file(file_id: str, caller: CallerDep, session: ReadSessionDep) -> FileObject:
    """Describe one file."""
    return FileObject.of(service.get(session, caller, file_id))


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: CallerDep, work: WorkDep, resources: ResourcesDep) -> FileDeleted:
    """Delete a file that no unfinished job needs."""
    return FileDeleted(id=service.delete(work, caller, file_id, storage=resources.storage).id)


def stored_content(file_id: str, caller: CallerDep, resources: ResourcesDep) -> Iterator[Path]:
    """The bytes of a file, as a file that can be read until the answer is sent."""
    with resources.read_sessions() as session:
        key = service.get(session, caller, file_id).storage_key
    with resources.storage.local_path(key) as path:
        yield path


@router.get("/{file_id}/content", response_class=FileResponse)
def get_file_content(path: Annotated[Path, Depends(stored_content)]) -> FileResponse:
    """Download the bytes as they were uploaded, or the ``Range`` of them that is asked for."""
    return FileResponse(path, media_type="application/octet-stream")
