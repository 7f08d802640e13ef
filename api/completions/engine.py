"""The engine's internal HTTP: a request goes out, lines of JSON come back as they are made.

The bodies are defined here for both sides; `generate` is the api's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from api.engines.client import EngineClient
from api.engines.provenance import Provenance
from api.errors import ApiError, DeadlineExceeded, EngineUnavailable

log = structlog.get_logger(__name__)


#: Tasks whose models answer with text.
WRITING_TASKS = ("chat", "completion")


class AdapterTarget(BaseModel):
    """The adapter that must answer.

    ``id`` names its row, whose bytes must have ``digest``. One that came with the request has neither: ``data`` is its
    artifact in base64, and ``id`` says only what to call it in messages.
    """

    id: str
    digest: str | None = None
    data: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if (self.digest is None) == (self.data is None):
            raise ValueError("either digest or data must be given")
        return self


class Message(BaseModel):
    """One message of the conversation."""

    role: str
    content: str


class JsonFormat(BaseModel):
    """The answer has to be JSON: an object, or what ``json_schema`` describes."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict[str, Any] | None = None


class GenerateRequest(BaseModel):
    """Body of ``POST /generate``: ``n`` answers to a conversation, or to each of several raw prompts.

    Raw prompts are texts or token ids, and are given to the model as they are. Choice ``i`` of prompt ``p`` has the
    index ``p * n + i``. ``max_tokens`` None means up to the context's end.
    """

    model_config = ConfigDict(extra="forbid")

    base_model: str
    adapter: AdapterTarget | None = None
    #: Whom the batch's rows are shared with fairly.
    project: str = ""
    messages: list[Message] | None = Field(default=None, min_length=1)
    prompts: list[str | list[int]] | None = Field(default=None, min_length=1)
    n: int = Field(default=1, ge=1)
    #: Put the prompt's text before each answer.
    echo: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=4)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: JsonFormat | None = None
    #: From the engine's receipt to the last token; what is not done then ends with ``deadline_exceeded``.
    deadline_seconds: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.messages is None) == (self.prompts is None):
            raise ValueError("either messages or prompts must be given")
        return self

    @property
    def choices(self) -> int:
        """How many answers there will be."""
        return self.n * len(self.prompts or [()])


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Start(_Event):
    """The prompts were accepted; ``prompt_tokens`` has a number for each."""

    type: Literal["start"] = "start"
    prompt_tokens: list[int]
    system_fingerprint: str
    provenance: Provenance


class TokenLogprob(_Event):
    """A token and its log probability, with those of the likeliest tokens at its place."""

    token: str
    bytes: list[int]
    logprob: float
    top: list[TokenLogprob] | None = None


class Delta(_Event):
    """More of one choice: text, and log probabilities of tokens if they were asked for. Either may be behind."""

    type: Literal["delta"] = "delta"
    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None
    #: Of this choice so far; 0 before its first, where a prompt is echoed.
    completion_tokens: int = 0


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
        InvalidRequest: the prompt does not fit the model's context, or the engine refuses another of its values.
        EngineBusy: too many requests wait for a row; the client may try again.
        RateLimited: too many of them are the project's own.
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
    if failure.code == "deadline_exceeded":
        return DeadlineExceeded(failure.message)
    log.error("generation_failed", code=failure.code, message=failure.message)
    return EngineUnavailable(failure.message, code=failure.code)
