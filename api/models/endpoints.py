"""``/v1/models``. Names may have slashes, which arrive decoded: hence ``:path``."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api.auth import CallerDep
from api.completions.responses import ClosingStream
from api.dependencies import ReadSessionDep, ResourcesDep, SessionDep, WorkDep
from api.files.upload import multipart_body
from api.models import importing, service
from api.models.downloads import AdapterFormat, Download
from api.models.engine import ExportDtype, export
from api.models.schemas import Model, ModelDeleted
from api.models.upload import AdapterUploadDep
from api.pagination import ListObject
from api.routing import Router

router = Router(prefix="/models", tags=["models"])

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ADAPTER_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": _BINARY, "application/zip": _BINARY}}
}
_IMPORT_BODY = multipart_body(
    "base_model",
    base_model={"type": "string"},
    suffix={"type": "string"},
    task={"type": "string", "enum": ["chat", "completion"]},
)


@router.get("")
def list_models(caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep) -> ListObject[Model]:
    """List the project's fine-tuned models and the base models."""
    models = service.list_models(session, caller, base_models=resources.settings.base_models)
    return ListObject.whole(models)


@router.post("", openapi_extra=_IMPORT_BODY)
async def import_model(upload: AdapterUploadDep, caller: CallerDep, work: WorkDep, resources: ResourcesDep) -> Model:
    """Make a model of an adapter that was trained elsewhere: ours, or a PEFT LoRA or VeRA folder in a zip or tar."""
    engine, settings = resources.engine, resources.settings
    return await importing.import_adapter(work, caller, upload, engine=engine, settings=settings)


# Before the next route, whose name of a model takes the rest of the path.
@router.get("/{model:path}/adapter", response_class=Response, responses=_ADAPTER_CONTENT)
async def get_adapter(
    model: str,
    caller: CallerDep,
    resources: ResourcesDep,
    format: AdapterFormat = "uora",
    dtype: ExportDtype | None = None,
) -> Response:
    """Download a fine-tuned model: as it is stored, a zip of the equal LoRA as PEFT reads it, or a zip of the whole
    model as transformers reads it, with its weights in ``dtype``."""

    def look_up() -> Download:
        with resources.read_sessions() as session:  # closed before an engine makes what has to be made
            base_models = resources.settings.base_models
            return service.download(session, caller, name=model, base_models=base_models, form=format, dtype=dtype)

    download = await run_in_threadpool(look_up)
    headers = {"ETag": f'"{download.etag}"', "Content-Disposition": f'attachment; filename="{download.filename}"'}
    if download.order is None:
        return Response(download.content, media_type=download.media_type, headers=headers)
    stack = AsyncExitStack()
    pieces = await stack.enter_async_context(export(resources.engine, download.order))
    return ClosingStream(pieces, close=stack.aclose, media_type=download.media_type, headers=headers)


@router.get("/{model:path}")
def get_model(model: str, caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep) -> Model:
    """Describe one model."""
    return service.get(session, caller, name=model, base_models=resources.settings.base_models)


@router.delete("/{model:path}")
def delete_model(model: str, caller: CallerDep, session: SessionDep, resources: ResourcesDep) -> ModelDeleted:
    """Delete a fine-tuned model and its checkpoints."""
    service.delete(session, caller, name=model, base_models=resources.settings.base_models)
    return ModelDeleted(id=model)
