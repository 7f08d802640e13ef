"""Answers that end with their client: nobody reads what is generated for a closed connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import ClientGone

T = TypeVar("T")


class ClosingStream(StreamingResponse):
    """An answer in pieces. ``close`` is called in the end, also if the client left before the first piece."""

    def __init__(
        self,
        pieces: AsyncIterator[str | bytes],
        *,
        close: Callable[[], Awaitable[None]],
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces until they end or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()


class EventStream(ClosingStream):
    """Server-sent events."""

    def __init__(
        self, events: AsyncIterator[str | bytes], *, close: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(
            events,
            close=close,
            media_type="text/event-stream",
            # Proxies that collect an answer before they pass it on would make a stream of it all at once.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
        )


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ClientGone: it left.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("The client closed the connection.")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    """Return when the client is gone. The body was read before, so that nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
