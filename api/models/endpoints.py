"""``/v1/models``. Names may have slashes, which arrive decoded: hence ``:path``."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from api.auth import CallerDep
from api.dependencies import ReadSessionDep, ResourcesDep, SessionDep, WorkDep
from api.files.upload import multipart_body
from api.models import importing, service
from api.models.downloads import AdapterFormat
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
def get_adapter(
    model: str,
    caller: CallerDep,
    session: ReadSessionDep,
    resources: ResourcesDep,
    format: AdapterFormat = "uora",
) -> Response:
    """Download a fine-tuned model: as it is stored, or a zip of the equal LoRA as PEFT reads it."""
    download = service.download(session, caller, name=model, base_models=resources.settings.base_models, form=format)
    headers = {"ETag": f'"{download.etag}"', "Content-Disposition": f'attachment; filename="{download.filename}"'}
    return Response(download.content, media_type=download.media_type, headers=headers)


@router.get("/{model:path}")
def get_model(model: str, caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep) -> Model:
    """Describe one model."""
    return service.get(session, caller, name=model, base_models=resources.settings.base_models)


@router.delete("/{model:path}")
def delete_model(model: str, caller: CallerDep, session: SessionDep, resources: ResourcesDep) -> ModelDeleted:
    """Delete a fine-tuned model and its checkpoints."""
    service.delete(session, caller, name=model, base_models=resources.settings.base_models)
    return ModelDeleted(id=model)
