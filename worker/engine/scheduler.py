"""The thread that owns the model: requests come in from any thread, and join the batch between two steps."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from time import monotonic

import structlog

from uora.artifact import Artifact
from uora.errors import DeadlineError
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Generation
from worker.engine.device_thread import DeviceThread
from worker.engine.fair_queue import FairQueue, Waiting

log = structlog.get_logger()

#: Waiting answers above which a request is refused, in batches.
_MAX_WAITING_BATCHES = 8
#: Weight of the newest answer in the moving average of how long answers take.
_NEWEST = 0.1


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


class Scheduler(DeviceThread):
    """Shares the batch's rows fairly between projects, and ends what is too late.

    A project may hold no more waiting places than it leaves free, so that whoever comes next finds some, however many
    of the others flood the queue. Stopped, it ends what is unfinished with an `EngineStoppedError`.
    """

    def __init__(self, batcher: Batcher, bank: AdapterBank, turn: threading.Lock | None = None) -> None:
        """
        Args:
            batcher: the batch; no other thread may touch it.
            bank: its adapters.
            turn: held during each step, by whoever else computes on the same device too.
        """
        super().__init__("engine-scheduler", turn)
        self._batcher = batcher
        self._bank = bank
        self._queue = FairQueue()
        self._max_waiting = _MAX_WAITING_BATCHES * batcher.free_rows
        self._running: dict[Generation, float] = {}  # since when
        self._seconds = 0.0  # that an answer takes; a moving average

    @property
    def waiting(self) -> int:
        """Answers that wait for a row."""
        with self._changed:
            return len(self._queue)

    @property
    def running(self) -> int:
        """Answers that have a row."""
        return len(self._running)

    def submit(self, generations: Sequence[Generation], artifact: Artifact | None) -> None:
        """Queue the answers of one request, all of one project: all of them or none.

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
            own = self._queue.waiting_of(generations[0].project)
            free = self._max_waiting - len(self._queue)
            if own + len(generations) > free - len(generations):
                raise EngineBusyError(own_share=own > 0, retry_after=max(1.0, self._seconds))
            self._queue.extend(Waiting(generation, artifact) for generation in generations)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._end_late()
                self._join(self._next())
                self._end_condemned()
                self.on_batch(len(self._running))
                with self._turn:
                    self._batcher.step()
            except Exception as error:  # the thread outlives whatever happens in a step
                log.exception("step_failed")
                self._give_up_batch(error)
            self._note_departures()
        self._give_up_batch(EngineStoppedError())
        self._end_waiting()

    def _end_condemned(self) -> None:
        if not self._condemned:
            return
        for generation in self._batcher.generations:
            error = None if generation.row is None else self._condemned.get(generation.row)
            if error is not None:
                _end(generation, error)

    def _wait_for_work(self) -> bool:
        """Whether there is work; False to stop."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) or self._batcher.running or self._stopping)
            return not self._stopping

    def _end_late(self) -> None:
        """End the answers whose deadline is over, and free the places of those that nobody waits for."""
        now = monotonic()

        def late(generation: Generation) -> bool:
            return generation.deadline is not None and generation.deadline <= now

        with self._changed:
            gone = self._queue.remove(lambda generation: generation.cancelled or late(generation))
        for generation in (*gone, *filter(late, self._running)):
            _end(generation, DeadlineError("The answer was not complete in time; ask for less or allow more time."))

    def _next(self) -> list[Waiting]:
        """The answers that get the free rows."""
        running = Counter(generation.project for generation in self._running)
        joining: list[Waiting] = []
        with self._changed:
            for _ in range(min(self._batcher.free_rows, len(self._queue))):
                item = self._queue.pop(running)
                running[item.generation.project] += 1
                joining.append(item)
        return joining

    def _join(self, joining: Sequence[Waiting]) -> None:
        for generation, artifact in joining:
            try:
                if artifact is not None:
                    generation.row = self._bank.put(artifact)
                self._running[generation] = generation.joined_at = monotonic()
                self._batcher.join([generation])
            except Exception as error:
                log.exception("adapter_refused", adapter=generation.adapter)
                _end(generation, error)

    def _note_departures(self) -> None:
        running = set(self._batcher.generations)
        for generation in [generation for generation in self._running if generation not in running]:
            seconds = monotonic() - self._running.pop(generation)
            self._seconds += _NEWEST * (seconds - self._seconds)

    def _give_up_batch(self, error: Exception) -> None:
        self._batcher.clear()
        for generation in self._running:
            _end(generation, error)

    def _end_waiting(self) -> None:
        with self._changed:
            waiting = self._queue.remove(lambda _: True)
        for generation in waiting:
            _end(generation, EngineStoppedError())


def _end(generation: Generation, error: Exception) -> None:
    """End an answer with an error, unless nobody waits for it any more; it leaves the batch at the next step."""
    if generation.cancelled:
        return
    generation.cancelled = True
    try:
        generation.emit(error)
    except Exception:  # whoever was to hear it is gone
        log.exception("error_not_told")
