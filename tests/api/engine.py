"""A small engine that speaks the internal HTTP: it says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TOKEN = "engine-token-of-the-tests"
START = {
    "type": "start",
    "prompt_tokens": [7],
    "system_fingerprint": "fp_test",
    "provenance": {"base": "b" * 64, "frames": "f" * 64, "adapter": "a" * 64},
}


def delta(text: str, *, index: int = 0, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A line with more text."""
    line = {"type": "delta", "index": index, "text": text}
    return line if logprobs is None else line | {"logprobs": logprobs}


def logprob(token: str, value: float, **top: float) -> dict[str, Any]:
    """A token's log probability, with those of others at its place."""
    line = {"token": token, "bytes": list(token.encode()), "logprob": value}
    return line | {"top": [logprob(*each) for each in top.items()]} if top else line


def finish(*, index: int = 0, reason: str = "stop", tokens: int = 2) -> dict[str, Any]:
    """A line that completes a choice."""
    return {"type": "finish", "index": index, "finish_reason": reason, "completion_tokens": tokens}


CLASSES = {
    "labels": ["fruit", "tool"],
    "probabilities": [[0.25, 0.75]],
    "values": [],
    "prompt_tokens": 5,
    "system_fingerprint": "fp_test",
    "provenance": {"base": "b" * 64, "frames": "f" * 64, "adapter": "a" * 64},
}
HELLO = [START, delta("Hel"), delta("lo"), finish()]


@dataclass
class ScriptedEngine:
    """What to answer, and what was asked."""

    token: str = TOKEN
    lines: list[dict[str, Any] | str] = field(default_factory=lambda: list(HELLO))
    #: The answer to ``/classify``.
    classes: dict[str, Any] = field(default_factory=lambda: dict(CLASSES))
    #: (status, body) instead of the lines.
    refusal: tuple[int, dict[str, Any]] | None = None
    #: Stop for this long before each line.
    pause_seconds: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    #: Generations that ran to their last line, and those whose connection was closed before.
    completed: int = 0
    cancelled: int = 0

    def reset(self) -> None:
        """Forget all requests, and say hello again."""
        self.__init__(token=TOKEN)  # type: ignore[misc] # the defaults of the fields, written once

    def app(self) -> Starlette:
        """The ASGI app."""
        return Starlette(
            routes=[
                Route("/generate", self._generate, methods=["POST"]),
                Route("/export", self._generate, methods=["POST"]),
                Route("/classify", self._classify, methods=["POST"]),
            ]
        )

    async def _generate(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": {"code": "unauthorized", "message": "bad token"}}, status_code=401)
        self.requests.append(await request.json())
        if self.refusal is not None:
            status, body = self.refusal
            return JSONResponse(body, status_code=status)
        return StreamingResponse(self._say(), media_type="application/x-ndjson")

    async def _classify(self, request: Request) -> Response:
        self.requests.append(await request.json())
        if self.refusal is not None:
            status, body = self.refusal
            return JSONResponse(body, status_code=status)
        try:
            await asyncio.sleep(self.pause_seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return JSONResponse(self.classes)

    async def _say(self) -> AsyncIterator[str]:
        try:
            for line in self.lines:
                await asyncio.sleep(self.pause_seconds)
                yield (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        self.completed += 1
