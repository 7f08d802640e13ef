"""The engines' internal HTTP: a request goes to the least loaded live engine, or to the next if that one takes nothing.

An answer that has begun is never asked for again. A request that was lost with its engine before that is sent to one
more engine, not to all: it may be what ended the first.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import httpx
import structlog

from api import tracing
from api.engines.service import EngineDirectory, LiveEngine
from api.errors import (
    ApiError,
    EngineBusy,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    NoEngine,
    RateLimited,
    Unavailable,
)

log = structlog.get_logger(__name__)


class _NotTaken(Exception):
    """The engine took nothing of the request, so that another may have it; ``answer`` is for want of another."""

    def __init__(self, answer: Unavailable) -> None:
        super().__init__(answer.message)
        self.answer = answer


class _Lost(_NotTaken):
    """The connection was lost before the answer began; nobody knows why."""


class EngineClient:
    """All engines of the installation behind one client.

    Args:
        client: without a base URL.
        directory: knows the live engines.
        token: the secret that engines ask for.
    """

    def __init__(self, client: httpx.AsyncClient, directory: EngineDirectory, *, token: str) -> None:
        self._client = client
        self._directory = directory
        self._headers = {"Authorization": f"Bearer {token}"}

    async def post(
        self, path: str, body: Mapping[str, Any], *, base_model: str, model: str | None = None
    ) -> httpx.Response:
        """Send a request and read the whole answer, whose status is 200.

        Args, Raises:
            As `stream`, whose iteration this is too.
        """
        async with AsyncExitStack() as stack:
            engine, response = await self._send(stack, path, body, base_model=base_model, model=model)
            try:
                await response.aread()
            except httpx.HTTPError as error:
                raise self._broken_off(engine, error) from error
            return response

    @asynccontextmanager
    async def stream(
        self, path: str, body: Mapping[str, Any], *, base_model: str, model: str | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request and read its answer as it comes. Leaving the block closes the connection, which cancels it.

        Args:
            path: of the engine's route.
            body: JSON.
            base_model: what the engine must serve.
            model: what the caller asked for, for messages; None is the base model.

        Returns:
            The body in pieces; iterating raises EngineUnavailable where the answer breaks off.

        Raises:
            ModelNotFound: the engine has no such adapter or base model.
            InvalidRequest: the engine cannot use the request.
            NoEngine: none is live for the base model.
            EngineBusy: none of them has room; the client may try again.
            RateLimited: the project has more requests waiting than its share.
            EngineUnavailable: none of them answers, or the answer cannot be used.
        """
        async with AsyncExitStack() as stack:
            engine, response = await self._send(stack, path, body, base_model=base_model, model=model)
            yield await stack.enter_async_context(aclosing(self._pieces(engine, response)))

    async def _send(
        self, stack: AsyncExitStack, path: str, body: Mapping[str, Any], *, base_model: str, model: str | None
    ) -> tuple[LiveEngine, httpx.Response]:
        """The engine that took the request and its answer, which ``stack`` closes. Each engine is asked once."""
        answer: Unavailable | None = None
        lost = 0
        candidates = await stack.enter_async_context(aclosing(self._directory.candidates(base_model)))
        async for engine in candidates:
            async with AsyncExitStack() as attempt:
                attempt.enter_context(self._directory.sending(engine))
                try:
                    response = await self._attempt(engine, path, body, model=model or base_model)
                except _NotTaken as refused:
                    answer = answer if isinstance(answer, EngineBusy) else refused.answer
                    lost += isinstance(refused, _Lost)
                    if lost > 1:
                        break
                    continue
                attempt.push_async_callback(response.aclose)
                stack.push_async_exit(attempt.pop_all())
                return engine, response
        raise answer or _no_engine(base_model)

    async def _attempt(self, engine: LiveEngine, path: str, body: Mapping[str, Any], *, model: str) -> httpx.Response:
        headers = self._headers | tracing.headers() | _request_id()
        request = self._client.build_request("POST", engine.url + path, json=body, headers=headers)
        try:
            response = await self._client.send(request, stream=True)
            if response.status_code == 200:
                return response
            content = await response.aread()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._directory.suspect(engine)
            log.warning("engine_unreachable", engine=engine.url, error=repr(error))
            raise _NotTaken(EngineUnavailable("The engine does not answer; try again.")) from error
        except httpx.TimeoutException as error:
            raise self._broken_off(engine, error) from error
        except httpx.HTTPError as error:
            raise _Lost(self._broken_off(engine, error)) from error
        raise _refusal(response.status_code, content, engine=engine, model=model)

    async def _pieces(self, engine: LiveEngine, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.HTTPError as error:
            raise self._broken_off(engine, error) from error

    def _broken_off(self, engine: LiveEngine, error: httpx.HTTPError) -> EngineUnavailable:
        log.error("engine_broke_off", engine=engine.url, error=repr(error))
        if isinstance(error, httpx.TimeoutException):
            return EngineUnavailable("The engine did not answer in time; try again.", code="engine_timeout")
        self._directory.suspect(engine)
        return EngineUnavailable("The engine broke off its answer; try again.", code="engine_interrupted")


def _request_id() -> dict[str, str]:
    """Of the request that this one is made for, so that the engine's log names it too."""
    found = structlog.contextvars.get_contextvars().get("request_id")
    return {} if found is None else {"x-request-id": found}


def _no_engine(base_model: str) -> NoEngine:
    return NoEngine(
        f"No engine serves the base model {base_model!r} now. Start one: UORA_ENGINE_BASE_MODEL={base_model} uvicorn "
        "--factory worker.engine.app:create_app. One that is starting serves as soon as it has loaded the model."
    )


def _refusal(status: int, body: bytes, *, engine: LiveEngine, model: str) -> ApiError | _NotTaken:
    """What the engine's refusal means for a caller of the api."""
    detail = _error_detail(body)
    code, message = str(detail.get("code")), str(detail.get("message"))
    if code in ("adapter_not_found", "model_not_found"):
        return ModelNotFound(f"The model {model!r} is not served: {message}", param="model")
    if status == 503 and code == "engine_busy":
        return _NotTaken(EngineBusy("The engine is busy; try again.", retry_after=detail.get("retry_after")))
    if status == 429:
        return RateLimited(
            "Too many of this project's requests are waiting for the engine; try again.",
            retry_after=detail.get("retry_after"),
        )
    if status == 503 and code == "engine_stopping":
        return _NotTaken(EngineUnavailable("The engine is shutting down; try again."))
    if status == 400:
        return InvalidRequest(message, code=code, param=detail.get("param"))
    log.error("engine_refused", engine=engine.url, status=status, code=code, message=message)
    return EngineUnavailable("The engine refused the request; the api's log names the cause.")


def _error_detail(body: bytes) -> dict[str, Any]:
    try:
        detail = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return detail if isinstance(detail, dict) else {}
