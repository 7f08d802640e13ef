"""The engine's internal HTTP: a request goes out, lines of JSON come back as they are made.

The bodies are defined here for both sides; `generate` is the api's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from api.engines.client import EngineClient
from api.errors import ApiError, EngineUnavailable

log = structlog.get_logger(__name__)


class AdapterTarget(BaseModel):
    """The adapter that must answer."""

    id: str
    digest: str


class Message(BaseModel):
    """One message of the conversation."""

    role: str
    content: str


class GenerateRequest(BaseModel):
    """Body of ``POST /generate``. ``max_tokens`` None means up to the context's end."""

    model_config = ConfigDict(extra="forbid")

    base_model: str
    adapter: AdapterTarget | None = None
    messages: list[Message] = Field(min_length=1)
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=4)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Start(_Event):
    """The prompt was accepted."""

    type: Literal["start"] = "start"
    prompt_tokens: int
    system_fingerprint: str


class Delta(_Event):
    """More text of one choice."""

    type: Literal["delta"] = "delta"
    index: int
    text: str


class Finish(_Event):
    """One choice is complete."""

    type: Literal["finish"] = "finish"
    index: int
    finish_reason: Literal["stop", "length"]
    completion_tokens: int


class Failure(_Event):
    """The generation broke off."""

    type: Literal["error"] = "error"
    code: str
    message: str


Event = Start | Delta | Finish
_EVENTS: TypeAdapter[Start | Delta | Finish | Failure] = TypeAdapter(
    Annotated[Start | Delta | Finish | Failure, Field(discriminator="type")]
)


@asynccontextmanager
async def generate(engine: EngineClient, request: GenerateRequest) -> AsyncIterator[AsyncIterator[Event]]:
    """Begin to generate. Leaving the block closes the connection, which cancels what is not done.

    Raises:
        ModelNotFound: the engine has no such adapter or base model.
        InvalidRequest: the conversation does not fit the model's context.
        EngineBusy: no engine has a free row; the client may try again.
        EngineUnavailable: none answers, or its answer breaks off or cannot be read.
    """
    model = request.adapter.id if request.adapter else request.base_model
    stream = engine.stream("/generate", request.model_dump(), base_model=request.base_model, model=model)
    async with stream as pieces, aclosing(_events(pieces)) as events:
        yield events


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
    """The engine's lines as events; a failure among them is raised."""
    try:
        async for line in _lines(pieces):
            event = _EVENTS.validate_json(line)
            if isinstance(event, Failure):
                raise _failed(event)
            yield event
    except ValidationError as error:
        log.exception("engine_line_not_understood")
        raise EngineUnavailable("The engine's answer could not be read; its log and the api's tell more.") from error


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole lines. Not httpx's, which also ends a line at the separators that a text may contain."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip():
                yield line


def _failed(failure: Failure) -> ApiError:
    log.error("generation_failed", code=failure.code, message=failure.message)
    return EngineUnavailable(failure.message, code=failure.code)
