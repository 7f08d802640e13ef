"""The thread that owns the model: requests come in from any thread, and join the batch between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import structlog

from uora.artifact import Artifact
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Generation
from uora.serving.rows import Row

log = structlog.get_logger()

#: Waiting answers above which a request is refused, in batches.
_MAX_WAITING_BATCHES = 8


class EngineBusyError(Exception):
    """Too many requests wait already.

    Attributes:
        own_share: whether they are too many of the same project; others may still queue theirs.
        retry_after: seconds until a place may be free.
    """

    def __init__(self, *, own_share: bool = False, retry_after: float = 1.0) -> None:
        super().__init__("too many requests wait already")
        self.own_share = own_share
        self.retry_after = retry_after


class EngineStoppedError(Exception):
    """The engine is shutting down."""


class Scheduler:
    """First come, first served, up to the batch's rows."""

    def __init__(self, batcher: Batcher, bank: AdapterBank) -> None:
        self._batcher = batcher
        self._bank = bank
        self._waiting: deque[tuple[Generation, Artifact | None]] = deque()
        self._condemned: WeakKeyDictionary[Row, Exception] = WeakKeyDictionary()
        self._max_waiting = _MAX_WAITING_BATCHES * batcher.free_rows
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; unfinished requests get an `EngineStoppedError`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Answers that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that have a row."""
        return len(self._batcher.generations)

    def submit(self, generations: Sequence[Generation], artifact: Artifact | None) -> None:
        """Queue the answers of one request.

        Args:
            generations: what to generate.
            artifact: their adapter, verified and checked; it becomes resident before they run. None if nothing has to
                be made resident.

        Raises:
            EngineBusyError: too many requests wait already.
            EngineStoppedError: the engine is shutting down.
        """
        with self._changed:
            if self._stopping:
                raise EngineStoppedError
            if len(self._waiting) + len(generations) > self._max_waiting:
                raise EngineBusyError
            self._waiting.extend((generation, artifact) for generation in generations)
            self._changed.notify()

    def end_holders(self, row: Row, error: Exception) -> None:
        """End all answers that have this very row, those that are yet to come too, before they take another step."""
        self._condemned[row] = error

    def _run(self) -> None:
        while True:
            joining = self._wait_for_work()
            if joining is None:
                break
            self._join(joining)
            self._end_condemned()
            self._batcher.step()
        self._end_all()

    def _end_condemned(self) -> None:
        if not self._condemned:
            return
        for generation in self._batcher.generations:
            error = None if generation.row is None else self._condemned.get(generation.row)
            if error is not None and not generation.cancelled:
                generation.emit(error)
                generation.cancelled = True

    def _wait_for_work(self) -> list[tuple[Generation, Artifact | None]] | None:
        """The requests that can join now; empty if only running ones need a step, None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._batcher.running or self._stopping)
            if self._stopping:
                return None
            count = min(self._batcher.free_rows, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _join(self, joining: list[tuple[Generation, Artifact | None]]) -> None:
        ready = []
        for generation, artifact in joining:
            if generation.cancelled:
                continue
            try:
                if artifact is not None:
                    generation.row = self._bank.put(artifact)
                ready.append(generation)
            except Exception as error:
                log.exception("adapter_refused", adapter=generation.adapter)
                generation.emit(error)
        if ready:
            self._batcher.join(ready)

    def _end_all(self) -> None:
        with self._changed:
            waiting = [generation for generation, _ in self._waiting]
            self._waiting.clear()
        for generation in (*waiting, *self._batcher.generations):
            generation.emit(EngineStoppedError())
