"""Adapters that were trained elsewhere become models as those of jobs are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from api.caller import Caller
from api.database import new_id, now
from api.engines.client import EngineClient
from api.errors import InvalidRequest, ModelNotFound, TooLarge
from api.models import engine as engines
from api.models.archives import Packed, unpack
from api.models.models import Adapter
from api.models.repository import AdapterRepository
from api.models.schemas import Model
from api.models.service import model_name
from api.models.upload import AdapterUpload
from api.quotas import service as quotas
from api.settings import Settings
from api.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from api.models.engine import BaseDescription
    from uora.artifact import Artifact


async def import_adapter(
    work: UnitOfWork, caller: Caller, upload: AdapterUpload, *, engine: EngineClient, settings: Settings
) -> Model:
    """Read, check and store an adapter: by its own digest, and by an engine as if it were asked.

    Raises:
        ModelNotFound: no such base model.
        TooLarge: it is too large.
        StorageQuotaExceeded: the project may not have as much.
        InvalidRequest: it is none, or does not belong to the base model.
        NoEngine: no engine serves the base model, which has the last word.
    """
    form = upload.form
    if form.base_model not in settings.base_models:
        raise ModelNotFound(
            f"{form.base_model!r} is no base model; expected one of {sorted(settings.base_models)}.",
            param="base_model",
        )
    max_bytes = settings.max_adapter_bytes
    content = await run_in_threadpool(_read, upload, max_bytes)
    packed = await run_in_threadpool(unpack, content, max_bytes=max_bytes)
    if packed is not None:
        description = await engines.describe(engine, base_model=form.base_model)
        content = await run_in_threadpool(_convert, packed, description, upload, max_bytes)
    artifact = await run_in_threadpool(_verify, content)
    manifest = artifact.manifest.model_dump(mode="json")
    await engines.check(engine, base_model=form.base_model, manifest=manifest)
    row = Adapter(
        id=model_name(form.base_model, slug=caller.project_slug, suffix=form.suffix, job_id=new_id("import-")),
        project_id=caller.project_id,
        base_model=form.base_model,
        digest=artifact.manifest.digest,
        manifest=manifest,
        artifact=content,
        created_at=now(),
    )
    return await run_in_threadpool(_store, work, row, caller)


def _read(upload: AdapterUpload, max_bytes: int) -> bytes:
    content = upload.source.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise TooLarge(f"The file has more than {max_bytes:,} bytes.", param="file")
    return content


def _convert(packed: Packed, description: BaseDescription, upload: AdapterUpload, max_bytes: int) -> bytes:
    from uora.errors import ArtifactError  # numpy is needed for nothing else here
    from uora.importing import PeftFolder, import_peft
    from uora.layout import ModuleShape

    modules = [
        ModuleShape(name=name, in_features=size_in, out_features=size_out)
        for name, (size_in, size_out) in description.modules.items()
    ]
    try:
        return import_peft(
            PeftFolder(packed.config, packed.weights),
            modules=modules,
            base_model=upload.form.base_model,
            base_digest=description.base_digest,
            chat_template_sha256=description.chat_template_sha256,
            task=upload.form.task,
            max_bytes=max_bytes,
        )
    except ArtifactError as error:
        raise InvalidRequest(error.message, param="file", code=error.code) from error


def _verify(content: bytes) -> Artifact:
    from uora.artifact import loads
    from uora.errors import ArtifactError

    try:
        return loads(content)
    except ArtifactError as error:
        raise InvalidRequest(
            f"{error.message} Expected an adapter of this service, or a zip or tar of a PEFT folder.",
            param="file",
            code=error.code,
        ) from error


def _store(work: UnitOfWork, row: Adapter, caller: Caller) -> Model:
    """The first use of the session, which holds a connection: what takes long comes before."""
    quotas.check_bytes(work.session, caller, added=len(row.artifact))
    return Model.of(AdapterRepository(work.session, row.project_id).add(row), owner=caller.project_slug)
