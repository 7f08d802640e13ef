"""Requests and tokens per minute: windows of a minute, the first request of which begins it.

They are counted in Redis where that is the broker, by all api processes together, and else in this process. A Redis
that does not answer limits nobody: it is asked again a little later.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError

from api.caller import Caller
from api.errors import RateLimited
from api.settings import Settings

log = structlog.get_logger(__name__)

T = TypeVar("T")

WINDOW_SECONDS = 60
#: For an answer of Redis; a request waits for it.
ANSWER_SECONDS: Final = 0.5
#: For how long one that did not answer is not asked.
PAUSE_SECONDS: Final = 5.0
#: The longest ``Retry-After`` that OpenAI's client obeys.
MAX_RETRY_SECONDS: Final = 60


@dataclass(frozen=True)
class Window:
    """What is left of a limit, and for how long."""

    limit: int
    remaining: int
    seconds_left: float

    def headers(self, of: str) -> dict[str, str]:
        """As OpenAI's, of ``requests`` or ``tokens``."""
        return {
            f"x-ratelimit-limit-{of}": str(self.limit),
            f"x-ratelimit-remaining-{of}": str(self.remaining),
            f"x-ratelimit-reset-{of}": f"{round(self.seconds_left, 3):g}s",
        }


class RateLimits:
    """Counts what projects ask of models.

    Args:
        storage: of the counts.
    """

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self._limiter = FixedWindowRateLimiter(storage)
        self._paused_until = 0.0

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[RateLimits]:
        """Those of the settings' broker, for as long as the block lasts."""
        if not settings.broker_url.startswith("redis"):
            yield cls(MemoryStorage(wrap_exceptions=True))
            return
        storage = RedisStorage(
            f"async+{settings.broker_url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="uora-limits",
            socket_connect_timeout=ANSWER_SECONDS,
            socket_timeout=ANSWER_SECONDS,
        )
        try:
            yield cls(storage)
        finally:
            await storage.bridge.get_connection().aclose()  # type: ignore[attr-defined] # limits has no close of its own

    async def admit(self, caller: Caller) -> dict[str, str]:
        """Count a request; returns headers of its answer, none for a project without limits.

        Raises:
            RateLimited: the project has used up its requests or tokens of this minute. It has the headers too.
        """
        quotas = caller.quotas
        if not (quotas.requests_per_minute or quotas.tokens_per_minute):
            return {}
        return await self._unless_away(lambda: self._admit(caller), otherwise={})

    async def spend(self, caller: Caller, tokens: int) -> None:
        """Count the tokens of an answer that has ended."""
        limit = caller.quotas.tokens_per_minute
        if limit and tokens:
            item = _item(limit)
            await self._unless_away(
                lambda: self._limiter.hit(item, "tokens", caller.project_id, cost=tokens), otherwise=True
            )

    async def windows(self, caller: Caller) -> dict[str, Window]:
        """What is left of the limits that the project has, by ``requests`` and ``tokens``."""
        quotas = caller.quotas
        limits = {"requests": quotas.requests_per_minute, "tokens": quotas.tokens_per_minute}

        async def look() -> dict[str, Window]:
            return {of: await self._window(caller, of, limit) for of, limit in limits.items() if limit}

        return await self._unless_away(look, otherwise={})

    async def _admit(self, caller: Caller) -> dict[str, str]:
        quotas, headers = caller.quotas, dict[str, str]()
        if quotas.tokens_per_minute:
            tokens = await self._window(caller, "tokens", quotas.tokens_per_minute)
            headers |= tokens.headers("tokens")
            if not tokens.remaining:
                raise _refusal(tokens, "tokens", headers)
        if quotas.requests_per_minute:
            admitted = await self._limiter.hit(_item(quotas.requests_per_minute), "requests", caller.project_id)
            requests = await self._window(caller, "requests", quotas.requests_per_minute)
            headers |= requests.headers("requests")
            if not admitted:
                raise _refusal(requests, "requests", headers)
        return headers

    async def _window(self, caller: Caller, of: str, limit: int) -> Window:
        reset, remaining = await self._limiter.get_window_stats(_item(limit), of, caller.project_id)
        return Window(limit, max(0, remaining), max(0.0, reset - time.time()))

    async def _unless_away(self, ask: Callable[[], Awaitable[T]], *, otherwise: T) -> T:
        if time.monotonic() < self._paused_until:
            return otherwise
        try:
            return await asyncio.wait_for(ask(), 2 * ANSWER_SECONDS)
        except (StorageError, TimeoutError, OSError) as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            log.warning("rate_limits_not_counted", seconds=PAUSE_SECONDS, error=repr(error))
            return otherwise


def _item(limit: int) -> RateLimitItemPerSecond:
    return RateLimitItemPerSecond(limit, WINDOW_SECONDS)


def _refusal(window: Window, of: str, headers: dict[str, str]) -> RateLimited:
    seconds = min(math.floor(window.seconds_left) + 1, MAX_RETRY_SECONDS)
    refusal = RateLimited(
        f"The project has used up its {window.limit} {of} per minute; try again in {seconds} s. GET /v1/usage/quotas "
        "shows its limits, which an organization-wide key can raise.",
        retry_after=seconds,
    )
    refusal.more_headers = headers
    return refusal
