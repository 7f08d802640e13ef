"""Jobs that many watch: versions are read for all requests of the moment together, and those who wait for a change
hold neither a connection nor a thread."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.jobs.repository import JobVersion, find_versions

T = TypeVar("T")
Versions = dict[tuple[str, str], JobVersion]

#: How soon a change is seen by those who wait for it.
TICK_SECONDS = 0.25
#: Ids of one statement at most.
MAX_BATCH = 1000
#: Answers that are kept to be given again.
MAX_BODY_BYTES = 16 * 2**20


class JobWatch:
    """Versions of jobs, as they are committed when they are asked for."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self.bodies = Bodies()
        self._sessions = sessions
        self._asked: dict[str, asyncio.Future[Versions]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Let all who wait answer now."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether nobody may wait any more."""
        return self._stopping.is_set()

    async def look(self, project_id: str, job_ids: Sequence[str]) -> list[JobVersion | None]:
        """The versions of a project's jobs, None for those that it does not have.

        What is asked for while a statement runs is read by the next one: each sees all that was committed when it was
        asked for, and however many ask at once, one statement at a time answers them all.
        """
        futures = {job_id: self._ask(job_id) for job_id in job_ids if _can_be_an_id(job_id)}
        await asyncio.gather(*futures.values())
        found = {job_id: future.result().get((project_id, job_id)) for job_id, future in futures.items()}
        return [found.get(job_id) for job_id in job_ids]

    async def look_at(self, project_id: str, job_id: str) -> JobVersion | None:
        """The version of one job."""
        if not _can_be_an_id(job_id):
            return None
        return (await self._ask(job_id)).get((project_id, job_id))

    async def wait(self, look: Callable[[], Awaitable[T]], done: Callable[[T], bool], *, seconds: float) -> T:
        """Look again and again until it is ``done``, the time is over or the process is to stop; the last look."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            found = await look()
            left = deadline - loop.time()
            if done(found) or left <= 0 or self.stopping:
                return found
            # At the same moments for all who wait, so that one statement looks for them all.
            await self._sleep(min(left, TICK_SECONDS - loop.time() % TICK_SECONDS))

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _ask(self, job_id: str) -> asyncio.Future[Versions]:
        future = self._asked.get(job_id)
        if future is None:
            future = self._asked[job_id] = asyncio.get_running_loop().create_future()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all())
        # Shielded: one of several who wait for it may leave.
        return asyncio.shield(future)

    async def _read_all(self) -> None:
        try:
            while self._asked:
                batch = dict(list(self._asked.items())[:MAX_BATCH])
                for job_id in batch:
                    del self._asked[job_id]
                await self._read(batch)
        finally:
            self._reading = None

    async def _read(self, batch: dict[str, asyncio.Future[Versions]]) -> None:
        try:
            versions = await run_in_threadpool(self._find, list(batch))
        except BaseException as error:
            for future in batch.values():
                future.set_exception(error)
                future.exception()  # told to those who still wait; no complaint if nobody does
            if not isinstance(error, Exception):
                raise
        else:
            for future in batch.values():
                future.set_result(versions)

    def _find(self, job_ids: list[str]) -> Versions:
        with self._sessions() as session:
            return find_versions(session, job_ids)


def _can_be_an_id(job_id: str) -> bool:
    """A statement must not fail of one id, such as one with a NUL, for those who asked for others."""
    return job_id.isascii() and job_id.isprintable()


class Bodies:
    """The newest of those answers that were given lately, each by the name of what it shows and with its tag."""

    def __init__(self, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    def get(self, name: str, tag: str) -> bytes | None:
        """The body, if it is the one of this tag."""
        with self._lock:
            found = self._kept.get(name)
            if found is None or found[0] != tag:
                return None
            self._kept.move_to_end(name)
            return found[1]

    def put(self, name: str, tag: str, body: bytes) -> None:
        """Keep the body instead of an earlier one."""
        with self._lock:
            self._drop(self._kept.pop(name, None))
            self._kept[name] = (tag, body)
            self._bytes += len(body)
            while self._bytes > self._max_bytes:
                self._drop(self._kept.popitem(last=False)[1])

    def _drop(self, kept: tuple[str, bytes] | None) -> None:
        self._bytes -= len(kept[1]) if kept else 0
