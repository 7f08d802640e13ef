"""The gateway: OpenAI's request to the engine's, the engine's events to OpenAI's answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.caller import Caller
from api.completions.engine import AdapterTarget, Delta, Event, Finish, GenerateRequest, Message, Start, generate
from api.completions.schemas import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionCreate,
    ChatMessage,
    Choice,
    ChunkChoice,
    Usage,
)
from api.database import new_id
from api.engines.client import EngineClient
from api.errors import ApiError, EngineUnavailable, InvalidRequest, UnsupportedParameter
from api.models import service as models
from api.models.service import ServedModel
from api.settings import Settings

log = structlog.get_logger(__name__)

#: Tasks whose models answer with text.
WRITING_TASKS = ("chat", "completion")
#: OpenAI's parameters that are not offered yet, with the values that ask for nothing (null always does).
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
#: What an assistant message of OpenAI's clients carries beside its text, empty unless it called a tool.
EMPTY: tuple[Any, ...] = (None, [], {}, "")


async def resolve(sessions: sessionmaker[Session], caller: Caller, *, name: str, settings: Settings) -> ServedModel:
    """Look the model up in a session that is closed before anything is generated."""

    def look_up() -> ServedModel:
        with sessions() as session:
            return models.resolve(session, caller, name=name, base_models=settings.base_models)

    return await run_in_threadpool(look_up)


def to_engine(body: ChatCompletionCreate, served: ServedModel, *, max_rows: int) -> GenerateRequest:
    """Translate a request.

    Raises:
        UnsupportedParameter: it asks for something that would have to be ignored.
        InvalidRequest: its parameters contradict each other, ask for too many answers, or its model writes no text.
    """
    _refuse_unsupported(body)
    if served.task not in WRITING_TASKS:
        raise InvalidRequest(
            f"The model {served.name} was trained for {served.task} and writes no text; expected a base model, or one "
            f"trained for {' or '.join(WRITING_TASKS)}.",
            param="model",
            code="model_not_supported",
        )
    n = body.n or 1
    if n > max_rows:
        raise InvalidRequest(f"n: found {n}; expected at most {max_rows}.", param="n")
    adapter = served.adapter
    return GenerateRequest(
        base_model=served.base_model,
        adapter=None if adapter is None else AdapterTarget(id=adapter.id, digest=adapter.digest),
        messages=[_message(message) for message in body.messages],
        n=n,
        max_tokens=_max_tokens(body),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
    )


async def complete(engine: EngineClient, request: GenerateRequest, *, model: str) -> ChatCompletion:
    """The whole answer to ``request``."""
    generation = await Generation.begin(engine, request, model=model)
    try:
        return await generation.collect()
    finally:
        await generation.close()


class Generation:
    """One running generation: the engine's start was read, the rest comes on demand.

    Whoever holds it must ``close`` it; that cancels what the engine has not done yet.
    """

    def __init__(self, events: AsyncIterator[Event], *, start: Start, model: str, n: int, stack: AsyncExitStack):
        self._events = events
        self._start = start
        self._model = model
        self._n = n
        self._stack = stack
        self._id = new_id("chatcmpl-")
        self._created = int(time.time())

    @classmethod
    async def begin(cls, engine: EngineClient, request: GenerateRequest, *, model: str) -> Generation:
        """Send the request and wait until the engine has accepted the prompt."""
        stack = AsyncExitStack()
        try:
            events = await stack.enter_async_context(generate(engine, request))
            start = await anext(events, None)
            if not isinstance(start, Start):
                raise EngineUnavailable("The engine ended before it began to answer; try again.")
        except BaseException:
            await stack.aclose()
            raise
        return cls(events, start=start, model=model, n=request.n, stack=stack)

    async def close(self) -> None:
        """Close the connection to the engine."""
        await self._stack.aclose()

    async def collect(self) -> ChatCompletion:
        """The whole answer."""
        answers = [_Answer() for _ in range(self._n)]
        async for event in self._checked():
            answers[event.index].add(event)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._start.system_fingerprint,
            choices=[answer.choice(index) for index, answer in enumerate(answers)],
            usage=self._usage(sum(answer.completion_tokens for answer in answers)),
        )

    async def stream(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, as OpenAI's: a failure is an event too, since the status is sent."""
        try:
            async with aclosing(self._chunks()) as chunks:
                completion_tokens = 0
                async for choice, tokens in chunks:
                    completion_tokens += tokens
                    yield self._encode([choice], include_usage=include_usage)
            if include_usage:
                yield self._encode([], include_usage=True, usage=self._usage(completion_tokens))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _sse(error.body())
        except Exception:
            log.exception("stream_failed")
            yield _sse(ApiError("The answer broke off by a fault of the server.").body())

    async def _chunks(self) -> AsyncGenerator[tuple[ChunkChoice, int], None]:
        """Choices to send, each with the completion tokens that are known with it."""
        for index in range(self._n):
            yield ChunkChoice(index=index, delta={"role": "assistant", "content": "", "refusal": None}), 0
        async for event in self._checked():
            if isinstance(event, Delta):
                yield ChunkChoice(index=event.index, delta={"content": event.text}), 0
            else:
                finished = ChunkChoice(index=event.index, delta={}, finish_reason=event.finish_reason)
                yield finished, event.completion_tokens

    async def _checked(self) -> AsyncIterator[Delta | Finish]:
        """The engine's events, known to be those of ``n`` complete answers.

        Raises:
            EngineUnavailable: a choice that was not asked for, or an end before all choices are complete.
        """
        unfinished = set(range(self._n))
        async for event in self._events:
            if isinstance(event, Start) or event.index not in unfinished:
                raise EngineUnavailable("The engine's answer could not be read.", code="engine_protocol")
            if isinstance(event, Finish):
                unfinished.remove(event.index)
            yield event
        if unfinished:
            raise EngineUnavailable("The engine broke off its answer; try again.", code="engine_interrupted")

    def _encode(self, choices: list[ChunkChoice], *, include_usage: bool, usage: Usage | None = None) -> str:
        chunk = ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._start.system_fingerprint,
            choices=choices,
            usage=usage,
        )
        return _sse(chunk.model_dump(exclude=None if include_usage else {"usage"}))

    def _usage(self, completion_tokens: int) -> Usage:
        return Usage.of(prompt_tokens=self._start.prompt_tokens, completion_tokens=completion_tokens)


@dataclass
class _Answer:
    """One choice, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    finish_reason: str = ""
    completion_tokens: int = 0

    def add(self, event: Delta | Finish) -> None:
        if isinstance(event, Delta):
            self.texts.append(event.text)
        else:
            self.finish_reason = event.finish_reason
            self.completion_tokens = event.completion_tokens

    def choice(self, index: int) -> Choice:
        message = AssistantMessage(content="".join(self.texts))
        return Choice(index=index, message=message, finish_reason=self.finish_reason)


def _refuse_unsupported(body: ChatCompletionCreate) -> None:
    for name, value in (body.model_extra or {}).items():
        if name not in NEUTRAL:
            raise InvalidRequest(
                f"Unknown parameter {name}; check its spelling or leave it out.",
                param=name,
                code="unknown_parameter",
            )
        if value is not None and value not in NEUTRAL[name]:
            raise UnsupportedParameter(f"{name} is not supported yet; leave it out.", param=name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes with stream=true only.", param="stream_options")
    for position, message in enumerate(body.messages):
        for name, value in (message.model_extra or {}).items():
            if value not in EMPTY:
                param = f"messages[{position}].{name}"
                raise UnsupportedParameter(f"{param} is not supported yet; leave it out.", param=param)


def _message(message: ChatMessage) -> Message:
    """Templates know ``system``, not its newer name ``developer``; text parts are lines."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role=role, content=message.content)
    return Message(role=role, content="\n".join(part.text for part in message.content))


def _max_tokens(body: ChatCompletionCreate) -> int | None:
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise InvalidRequest(
            f"Found max_tokens {older} and max_completion_tokens {newer}; give the latter only.",
            param="max_tokens",
        )
    return older if newer is None else newer


def _sse(data: dict[str, Any]) -> str:
    # ASCII only: some clients take Unicode's line separators for the end of an event's line.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
