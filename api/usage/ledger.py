"""The ledger's end in this process: amounts are added up in memory and written together, once a second.

So a token costs an addition, whatever the database does meanwhile. A process that is killed takes the last second with
it; one that is told to stop writes it first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from api.caller import Caller
from api.database import new_id
from api.usage import repository
from api.usage.models import Operation
from api.usage.repository import Amounts, UsageKey, present_minute

log = structlog.get_logger(__name__)

#: From one writing to the next.
WRITE_SECONDS: Final = 1.0
#: Attempts to write the rest when the process stops.
LAST_ATTEMPTS: Final = 5


@dataclass
class Batch:
    """Amounts that are written in one transaction, as often as it takes; nothing is added to them any more."""

    number: int
    used: dict[UsageKey, Amounts]


class UsageLedger:
    """Adds to the ledger, from the event loop's thread alone.

    Args:
        sessions: for writing.
    """

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._writer_id = new_id("writer-")
        self._batches = 0
        self._used: dict[UsageKey, Amounts] = {}
        #: What is being written; None if all is.
        self._batch: Batch | None = None

    def add(
        self,
        caller: Caller,
        model: str,
        operation: Operation,
        *,
        requests: int = 0,
        input_tokens: int = 0,
        output_tokens: int = 0,
        items: int = 0,
    ) -> None:
        """Add to the present minute."""
        key = UsageKey(caller.project_id, present_minute(), caller.key_id, model, operation)
        amounts = self._used.get(key)
        if amounts is None:
            amounts = self._used[key] = Amounts()
        amounts.requests += requests
        amounts.input_tokens += input_tokens
        amounts.output_tokens += output_tokens
        amounts.items += items

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Write every second for as long as the block lasts, and the rest at its end."""
        stopping = asyncio.Event()
        writing = asyncio.create_task(self._write_until(stopping))
        try:
            yield
        finally:
            stopping.set()
            await writing
            await self._write_rest()

    async def write(self) -> bool:
        """Write what was added until now; False if the database does not take it, which keeps it for the next time."""
        if self._batch is None and self._used:
            self._batches += 1
            self._batch, self._used = Batch(self._batches, self._used), {}
        if self._batch is not None:
            try:
                await asyncio.to_thread(self._commit, self._batch)
            except SQLAlchemyError as error:
                log.warning("usage_not_written", rows=len(self._batch.used), error=repr(error))
                return False
            self._batch = None
        return True

    def _commit(self, batch: Batch) -> None:
        with self._sessions.begin() as session:
            if repository.begin_batch(session, self._writer_id, batch.number):
                repository.add(session, batch.used)

    async def _write_until(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), WRITE_SECONDS)
            try:
                await self.write()
            except Exception:
                log.exception("usage_writing_failed")  # whatever it is, the next second has its own attempt

    async def _write_rest(self) -> None:
        for attempt in range(LAST_ATTEMPTS):
            if attempt:
                await asyncio.sleep(WRITE_SECONDS)
            # Twice, where an earlier batch is still waiting.
            if await self.write() and await self.write():
                return
        lost = [*(self._batch.used if self._batch else {}).items(), *self._used.items()]
        log.error("usage_lost", used=[asdict(key) | asdict(amounts) for key, amounts in lost])


class Meter:
    """Counts one answer while it is made: what its client did not wait for was made all the same.

    Args:
        ledger: takes the counts.
        caller: who is to be charged.
        model: as the request named it.
        operation: what it is used for.
    """

    def __init__(self, ledger: UsageLedger, caller: Caller, model: str, operation: Operation) -> None:
        self.caller = caller
        self._ledger = ledger
        self._of = (caller, model, operation)
        self._completed: dict[int, int] = {}
        #: Of prompts and answers so far.
        self.tokens = 0

    def begin(self, prompt_tokens: int) -> None:
        """The engine has accepted the request."""
        self.tokens += prompt_tokens
        self._ledger.add(*self._of, requests=1, input_tokens=prompt_tokens)

    def count(self, index: int, completion_tokens: int) -> None:
        """So many tokens has the answer ``index`` by now."""
        more = completion_tokens - self._completed.get(index, 0)
        if more > 0:
            self._completed[index] = completion_tokens
            self.tokens += more
            self._ledger.add(*self._of, output_tokens=more)
