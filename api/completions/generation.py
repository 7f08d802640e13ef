"""A running generation: the engine's events become an answer, in one piece or streamed, in either dialect."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from api.completions.engine import Delta, Event, Finish, GenerateRequest, Start, TokenLogprob, generate
from api.database import new_id
from api.engines.client import EngineClient
from api.errors import ApiError, EngineUnavailable
from api.usage.ledger import Meter

log = structlog.get_logger(__name__)


@dataclass
class Answer:
    """One choice, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0

    def add(self, event: Delta | Finish) -> None:
        """Take in more."""
        if isinstance(event, Delta):
            self.texts.append(event.text)
            self.logprobs += event.logprobs or ()
        else:
            self.finish_reason = event.finish_reason
            self.completion_tokens = event.completion_tokens


class Dialect(Protocol):
    """How one kind of completion writes its choices. One object serves one answer, and may count along."""

    id_prefix: str
    #: OpenAI's names of the whole answer and of a streamed piece.
    whole: str
    piece: str

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        """Choices to stream before a choice's first text."""

    def part(self, event: Delta | Finish) -> dict[str, Any]:
        """A streamed choice."""

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole choice."""


class Generation:
    """The engine's start was read, the rest comes on demand.

    Whoever holds it must ``close`` it; that cancels what the engine has not done yet. Answers are built as plain
    dicts: with many streams at once, a model to validate for each token would take its time from the engine.
    """

    def __init__(
        self,
        events: AsyncIterator[Event],
        *,
        start: Start,
        dialect: Dialect,
        meter: Meter,
        model: str,
        n: int,
        stack: AsyncExitStack,
    ) -> None:
        self._events = events
        self._meter = meter
        self._dialect = dialect
        self._n = n
        self._stack = stack
        self._prompt_tokens = sum(start.prompt_tokens)
        #: Of the HTTP answer: what produced it.
        self.headers = {"x-uora-provenance": start.provenance.header()}
        self._envelope = {
            "id": new_id(dialect.id_prefix),
            "object": dialect.whole,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": start.system_fingerprint,
        }

    @classmethod
    async def begin(
        cls, engine: EngineClient, request: GenerateRequest, *, dialect: Dialect, meter: Meter, model: str
    ) -> Generation:
        """Send the request and wait until the engine has accepted the prompts; ``meter`` counts from then on."""
        stack = AsyncExitStack()
        try:
            events = await stack.enter_async_context(generate(engine, request))
            start = await anext(events, None)
            if not isinstance(start, Start):
                raise EngineUnavailable("The engine ended before it began to answer; try again.")
        except BaseException:
            await stack.aclose()
            raise
        meter.begin(sum(start.prompt_tokens))
        return cls(events, start=start, dialect=dialect, meter=meter, model=model, n=request.choices, stack=stack)

    async def close(self) -> None:
        """Close the connection to the engine."""
        await self._stack.aclose()

    async def collect(self) -> dict[str, Any]:
        """The whole answer."""
        answers = [Answer() for _ in range(self._n)]
        async for event in self._checked():
            answers[event.index].add(event)
        return self._envelope | {
            "choices": [self._dialect.choice(index, answer) for index, answer in enumerate(answers)],
            "usage": self._usage(sum(answer.completion_tokens for answer in answers)),
        }

    async def stream(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, as OpenAI's: a failure is an event too, since the status is sent."""
        envelope: dict[str, Any] = self._envelope | {"object": self._dialect.piece}
        if include_usage:  # null in all pieces but the last
            envelope["usage"] = None
        try:
            async with aclosing(self._parts()) as parts:
                completion_tokens = 0
                async for choice, tokens in parts:
                    completion_tokens += tokens
                    yield _sse(envelope | {"choices": [choice]})
            if include_usage:
                yield _sse(envelope | {"choices": [], "usage": self._usage(completion_tokens)})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _sse(error.body())
        except Exception:
            log.exception("stream_failed")
            yield _sse(ApiError("The answer broke off by a fault of the server.").body())

    async def _parts(self) -> AsyncGenerator[tuple[dict[str, Any], int], None]:
        """Choices to send, each with the completion tokens that are known with it."""
        for index in range(self._n):
            for choice in self._dialect.opening(index):
                yield choice, 0
        async for event in self._checked():
            yield self._dialect.part(event), event.completion_tokens if isinstance(event, Finish) else 0

    async def _checked(self) -> AsyncIterator[Delta | Finish]:
        """The engine's events, known to be those of ``n`` complete answers.

        Raises:
            EngineUnavailable: a choice that was not asked for, or an end before all choices are complete.
        """
        unfinished = set(range(self._n))
        async for event in self._events:
            if isinstance(event, Start) or event.index not in unfinished:
                raise EngineUnavailable("The engine's answer could not be read.", code="engine_protocol")
            self._meter.count(event.index, event.completion_tokens)
            if isinstance(event, Finish):
                unfinished.remove(event.index)
            yield event
        if unfinished:
            raise EngineUnavailable("The engine broke off its answer; try again.", code="engine_interrupted")

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }


def _sse(data: dict[str, Any]) -> str:
    # ASCII only: some clients take Unicode's line separators for the end of an event's line.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
