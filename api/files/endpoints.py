"""``/v1/files``"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends
from starlette.responses import StreamingResponse

from api.auth import CallerDep
from api.dependencies import PageParams, ReadSessionDep, ResourcesDep, WorkDep
from api.files import service
from api.files.schemas import FileDeleted, FileObject, Purpose
from api.files.upload import UploadDep
from api.pagination import ListObject, PageQuery
from api.routing import Router

router = Router(prefix="/files", tags=["files"])

AnyPurpose = Purpose | Literal["fine-tune-results"]
FilePage = Annotated[PageQuery, Depends(PageParams(default_limit=10_000, max_limit=10_000))]

_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [purpose.value for purpose in Purpose]},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_UPLOAD_BODY)
def create_file(caller: CallerDep, work: WorkDep, resources: ResourcesDep, upload: UploadDep) -> FileObject:
    """Upload a file."""
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


@router.get("/{file_id}/content", response_class=StreamingResponse)
def get_file_content(
    file_id: str, caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep
) -> StreamingResponse:
    """Download the bytes as they were uploaded."""
    file = service.get(session, caller, file_id)
    source = resources.storage.open(file.storage_key)
    headers = {"content-length": str(file.bytes)}
    return StreamingResponse(service.read_chunks(source), media_type="application/octet-stream", headers=headers)
