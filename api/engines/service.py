"""Which engine takes a request: of those that are live, the one with the least to do."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.engines import repository

#: How old the known table may be; requests need no query of their own.
MAX_AGE_SECONDS = 0.5


@dataclass(frozen=True)
class LiveEngine:
    """An engine as its last heartbeat described it.

    Attributes:
        id: of the row.
        url: where it is reached.
        base_model: what it serves.
        load: sequences that it decoded or that waited.
        capacity: sequences that it decodes together.
        heartbeat_at: of the heartbeat, by the database's clock.
        heard_at: the same moment by this process's monotonic clock, in seconds.
    """

    id: str
    url: str
    base_model: str
    load: int
    capacity: int
    heartbeat_at: datetime
    heard_at: float


class EngineDirectory:
    """The live engines, and what this process has sent to them.

    Args:
        sessions: where the engines register; only read.
        ttl: an engine without a heartbeat for this long is dead.
    """

    def __init__(self, sessions: sessionmaker[Session], *, ttl: timedelta) -> None:
        self._sessions = sessions
        self._ttl = ttl
        self._engines: list[LiveEngine] = []
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        #: Engine id -> when the requests that are open now were sent to it.
        self._sent: dict[str, list[float]] = {}
        #: Engine id -> the last heartbeat before it could not be reached.
        self._suspects: dict[str, datetime] = {}

    async def live(self, *, since: float = float("-inf")) -> list[LiveEngine]:
        """All live engines, as of half a second ago at most, and of no time before ``since`` (``time.monotonic``)."""
        async with self._reading:
            asked_at = time.monotonic()
            if asked_at - self._read_at > MAX_AGE_SECONDS or self._read_at < since:
                self._engines = await run_in_threadpool(self._read)
                self._read_at = asked_at
        return self._engines

    async def candidates(self, base_model: str) -> AsyncGenerator[LiveEngine, None]:
        """Whom to ask one after the other, each once: those that are known, and then those that have come meanwhile."""
        began = time.monotonic()
        asked: set[str] = set()
        for since in (float("-inf"), began):
            for engine in await self.ranked(base_model, since=since):
                if engine.id not in asked:
                    asked.add(engine.id)
                    yield engine

    async def ranked(self, base_model: str, *, since: float = float("-inf")) -> list[LiveEngine]:
        """The live engines of a base model, the least loaded first, equals in any order; suspects come last."""
        engines = [engine for engine in await self.live(since=since) if engine.base_model == base_model]
        random.shuffle(engines)
        return sorted(engines, key=lambda engine: (self._is_suspect(engine), self._load(engine)))

    @contextmanager
    def sending(self, engine: LiveEngine) -> Iterator[None]:
        """Count a request to ``engine`` while the block lasts, so that those of the next moment go elsewhere."""
        sent_at = time.monotonic()
        self._sent.setdefault(engine.id, []).append(sent_at)
        try:
            yield
        finally:
            self._sent[engine.id].remove(sent_at)
            if not self._sent[engine.id]:
                del self._sent[engine.id]

    def suspect(self, engine: LiveEngine) -> None:
        """Prefer every other engine until this one gives another heartbeat."""
        self._suspects[engine.id] = engine.heartbeat_at

    def _is_suspect(self, engine: LiveEngine) -> bool:
        return self._suspects.get(engine.id) == engine.heartbeat_at

    def _load(self, engine: LiveEngine) -> float:
        """In batches; what was sent before the heartbeat is counted in it."""
        unheard = sum(sent_at > engine.heard_at for sent_at in self._sent.get(engine.id, ()))
        return (engine.load + unheard) / engine.capacity

    def _read(self) -> list[LiveEngine]:
        asked_at = time.monotonic()
        with self._sessions() as session:
            found = repository.live(session, ttl=self._ttl)
        live_ids = {row.id for row, _ in found}
        self._suspects = {engine_id: at for engine_id, at in self._suspects.items() if engine_id in live_ids}
        return [
            LiveEngine(
                id=row.id,
                url=row.url,
                base_model=row.base_model,
                load=row.running + row.waiting,
                capacity=row.capacity,
                heartbeat_at=row.heartbeat_at,
                heard_at=asked_at - age.total_seconds(),
            )
            for row, age in found
        ]
