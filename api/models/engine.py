"""What an engine is asked about models: before an adapter from elsewhere is taken in, and for forms to take away that
stand on the base model's weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from api.engines.client import EngineClient
from api.errors import EngineUnavailable

log = structlog.get_logger(__name__)


class DescribeRequest(BaseModel):
    """Which base model the engine must serve."""

    model_config = ConfigDict(extra="forbid")

    base_model: str


class BaseDescription(BaseModel):
    """A base model, as an adapter for it must be.

    Attributes:
        base_digest: of its weights.
        chat_template_sha256: of its chat template.
        modules: ``(in, out)`` of its linear layers by their names, in the model's order.
    """

    base_digest: str
    chat_template_sha256: str | None
    modules: dict[str, tuple[int, int]]


class CheckRequest(BaseModel):
    """The manifest of an adapter that is to be served."""

    model_config = ConfigDict(extra="forbid")

    base_model: str
    manifest: dict[str, Any]


#: Of a merged model's weights.
ExportDtype = Literal["float32", "bfloat16", "float16"]


class ExportRequest(BaseModel):
    """An adapter in a form that needs the base model.

    Attributes:
        adapter: the row's name.
        digest: what its bytes must have.
        form: a PEFT LoRA, or the base model with the adapter in its weights.
        dtype: of a merged model; None takes the one that the base model is stored in.
    """

    model_config = ConfigDict(extra="forbid")

    base_model: str
    adapter: str
    digest: str
    form: Literal["lora", "merged"]
    dtype: ExportDtype | None = None


def export(engine: EngineClient, request: ExportRequest) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
    """A zip in pieces; errors are those of `EngineClient.stream`."""
    return engine.stream("/export", request.model_dump(), base_model=request.base_model, model=request.adapter)


async def describe(engine: EngineClient, *, base_model: str) -> BaseDescription:
    """Ask for the base model's shapes; errors are those of `EngineClient.post`."""
    request = DescribeRequest(base_model=base_model)
    response = await engine.post("/describe", request.model_dump(), base_model=base_model)
    try:
        return BaseDescription.model_validate_json(response.content)
    except ValidationError as error:
        log.exception("engine_answer_not_understood")
        raise EngineUnavailable("The engine's answer could not be read; its log and the api's tell more.") from error


async def check(engine: EngineClient, *, base_model: str, manifest: dict[str, Any]) -> None:
    """Have the engine check an adapter as it would before serving it; errors are those of `EngineClient.post`."""
    request = CheckRequest(base_model=base_model, manifest=manifest)
    await engine.post("/check", request.model_dump(), base_model=base_model)
