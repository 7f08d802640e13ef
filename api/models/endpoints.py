"""``/v1/models``. Names may have slashes, which arrive decoded: hence ``:path``."""

from __future__ import annotations

from fastapi import APIRouter

from api.auth import CallerDep
from api.dependencies import ReadSessionDep, ResourcesDep, SessionDep
from api.models import service
from api.models.schemas import Model, ModelDeleted
from api.pagination import ListObject

router = APIRouter(prefix="/models", tags=["models"])


@router.get("")
def list_models(caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep) -> ListObject[Model]:
    """List the project's fine-tuned models and the base models."""
    models = service.list_models(session, caller, base_models=resources.settings.base_models)
    return ListObject.whole(models)


@router.get("/{model:path}")
def get_model(model: str, caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep) -> Model:
    """Describe one model."""
    return service.get(session, caller, name=model, base_models=resources.settings.base_models)


@router.delete("/{model:path}")
def delete_model(model: str, caller: CallerDep, session: SessionDep, resources: ResourcesDep) -> ModelDeleted:
    """Delete a fine-tuned model and its checkpoints."""
    service.delete(session, caller, name=model, base_models=resources.settings.base_models)
    return ModelDeleted(id=model)
