"""Names of models, and what can be done with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.caller import Caller
from api.errors import InvalidRequest, ModelNotFound, PermissionDenied
from api.models.downloads import AdapterFormat, Download, make_download
from api.models.engine import ExportDtype
from api.models.models import Adapter
from api.models.repository import AdapterRepository
from api.models.schemas import Model

#: How much of a job's id tells its models apart.
JOB_ID_LETTERS = 8


@dataclass(frozen=True)
class AdapterRef:
    """What the engine must serve: the row's name, and the digest that its bytes must have."""

    id: str
    digest: str


@dataclass(frozen=True)
class ServedModel:
    """What a model name stands for in the caller's project."""

    name: str
    base_model: str
    adapter: AdapterRef | None
    #: ``uora.spec.Task`` that the adapter was trained for.
    task: str = "chat"


def model_name(base_model: str, *, slug: str, suffix: str | None, job_id: str) -> str:
    """``ft:<base>:<project>:<suffix>:<id>``; without a suffix its place stays empty, as in OpenAI's names."""
    return f"ft:{base_model}:{slug}:{suffix or ''}:{job_id[-JOB_ID_LETTERS:]}"


def checkpoint_name(name: str, *, step: int) -> str:
    """The name of a final model's checkpoint."""
    return f"{name}:ckpt-step-{step}"


def list_models(session: Session, caller: Caller, *, base_models: Collection[str]) -> list[Model]:
    """The project's final models and those shared with it, newest first, and then the base models."""
    repository = AdapterRepository(session, caller.project_id)
    adapters = repository.list_usable()
    owners = repository.owners(adapters)
    tuned = [Model.of(adapter, owner=owners[adapter.project_id]) for adapter in adapters]
    return tuned + [Model.base(name) for name in base_models]


def get(session: Session, caller: Caller, *, name: str, base_models: Collection[str]) -> Model:
    """One model, checkpoints included; raises ``ModelNotFound``."""
    if name in base_models:
        return Model.base(name)
    adapter = _get_usable(session, caller, name)
    owners = AdapterRepository(session, caller.project_id).owners([adapter])
    return Model.of(adapter, owner=owners[adapter.project_id])


def resolve(session: Session, caller: Caller, *, name: str, base_models: Collection[str]) -> ServedModel:
    """What answers to ``name``. A name that stands for nothing is never answered by a base model.

    Raises:
        ModelNotFound: neither a base model, nor one of the project's, nor one that is shared with it.
    """
    if name in base_models:
        return ServedModel(name=name, base_model=name, adapter=None)
    adapter = _get_usable(session, caller, name)
    return ServedModel(
        name=name,
        base_model=adapter.base_model,
        adapter=AdapterRef(id=adapter.id, digest=adapter.digest),
        task=adapter.manifest.get("task", "chat"),
    )


def download(
    session: Session,
    caller: Caller,
    *,
    name: str,
    base_models: Collection[str],
    form: AdapterFormat,
    dtype: ExportDtype | None = None,
) -> Download:
    """A fine-tuned model, checkpoints included, to take away.

    Raises:
        InvalidRequest: it is a base model, or ``dtype`` is asked of a form that has none.
        PermissionDenied: it is another project's, which shares its answers only.
        ModelNotFound: there is none in the project.
    """
    if name in base_models:
        raise InvalidRequest(f"{name!r} is a base model; only fine-tuned models have an adapter.", param="model")
    return make_download(_get_own(session, caller, name), form, dtype)


def delete(session: Session, caller: Caller, *, name: str, base_models: Collection[str]) -> None:
    """Delete a checkpoint, or a final model with its checkpoints.

    Raises:
        PermissionDenied: it is a base model, or another project's.
        ModelNotFound: there is none in the project.
    """
    if name in base_models:
        raise PermissionDenied(f"{name!r} is a base model; only fine-tuned models can be deleted.", param="model")
    adapters = AdapterRepository(session, caller.project_id)
    adapter = _get_own(session, caller, name)
    final_of_job = adapter.checkpoint_step is None and adapter.job_id is not None
    adapters.delete(adapters.list_of_job(adapter.job_id) if final_of_job and adapter.job_id else [adapter])


def _get_own(session: Session, caller: Caller, name: str) -> Adapter:
    adapter = _get_usable(session, caller, name)
    if adapter.project_id != caller.project_id:
        raise PermissionDenied(
            f"The model {name!r} is shared with this project, which may ask it; only its own project may do this.",
            param="model",
        )
    return adapter


def _get_usable(session: Session, caller: Caller, name: str) -> Adapter:
    adapter = AdapterRepository(session, caller.project_id).find_usable(name)
    if adapter is None:
        raise ModelNotFound(
            f"The model {name!r} does not exist or you do not have access to it; GET /v1/models lists yours.",
            param="model",
        )
    return adapter
