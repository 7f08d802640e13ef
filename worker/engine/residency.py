"""Keeps the bank equal to the database, and what it holds equal to what is stored.

A new adapter is resident before anybody asks for it, and one that was deleted is gone a moment later. No request
depends on it: what is not resident is loaded when it is asked for, and an answer that has begun keeps its row.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection

import structlog

from uora.artifact import Manifest
from uora.errors import ArtifactError
from uora.serving.bank import AdapterBank
from uora.serving.rows import Row
from worker.engine.adapters import AdapterStore, Stored

log = structlog.get_logger()

#: Between two comparisons of all digests where nothing has changed: if no trigger notes changes, this finds them.
COMPARISON_SECONDS = 30.0
#: Adapters loaded between two looks at what has changed.
BATCH = 50


def _nobody(_row: Row, _error: Exception) -> None:
    """Tell nobody."""


class Residency:
    """A thread that makes new adapters resident, lets deleted ones go and audits random ones.

    A database that does not answer changes nothing, and is asked again at the next interval.
    """

    def __init__(
        self,
        bank: AdapterBank,
        store: AdapterStore,
        *,
        base_model: str,
        tasks: Collection[str],
        check: Callable[[Manifest], None],
        interval: float = 0.5,
        audit_interval: float = 1.0,
        on_corrupted: Callable[[Row, Exception], None] = _nobody,
    ) -> None:
        """Nothing happens before `start`.

        Args:
            bank: what is resident.
            store: what should be.
            base_model: the name whose adapters belong into the bank.
            tasks: those for which they were trained.
            check: raises for one that cannot answer here.
            interval: seconds between two looks into the database.
            audit_interval: seconds between two audits.
            on_corrupted: told of a row in memory that is not what is stored, and what its answers are to end with.
        """
        self._bank = bank
        self._store = store
        self._base_model = base_model
        self._tasks = tasks
        self._check = check
        self._interval = interval
        self._audit_interval = audit_interval
        self._on_corrupted = on_corrupted
        self._version: int | None = None
        self._compare_at = self._audit_at = 0.0  # time.monotonic
        self._stored: dict[str, int] = {}  # digest -> seq, newest first, by the last comparison
        self._missing: list[str] = []  # to be loaded, newest last
        self._refused: set[str] = set()  # do not belong here, or are damaged
        self._without_room: set[str] = set()
        self._failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-residency", daemon=True)

    def start(self) -> None:
        """Begin with the newest adapters."""
        self._thread.start()

    def stop(self) -> None:
        """End after the adapter at hand."""
        self._stopping.set()
        self._thread.join()

    def look(self) -> None:
        """Compare if something has changed, then load up to `BATCH` of what is missing."""
        version = self._store.version(self._base_model)
        if version != self._version or time.monotonic() >= self._compare_at:
            self._compare()
            self._version = version  # read before the digests: what came in between is found by the next look
        if self._missing:
            self._load_batch()

    def audit(self) -> None:
        """Read one resident adapter again, at random, and make sure that the bank holds it bit by bit."""
        resident = list(self._bank.digests() & self._stored.keys())
        if resident:
            self._audit(random.choice(resident))  # noqa: S311 # any will do

    def _run(self) -> None:
        while not self._stopping.wait(0.0 if self._missing and not self._failing else self._interval):
            self._attempt()

    def _attempt(self) -> None:
        """Look, and audit when it is time; an outage is logged when it begins and when it is over."""
        try:
            self.look()
            if time.monotonic() >= self._audit_at:
                self.audit()
                self._audit_at = time.monotonic() + self._audit_interval
        except Exception as error:  # whatever it is, the next look may do better
            if not self._failing:
                log.warning("adapters_not_compared", error=str(error))
            self._failing = True
            self._compare_at = 0.0  # a batch may have been left half loaded
        else:
            if self._failing:
                log.info("adapters_compared_again")
            self._failing = False

    def _compare(self) -> None:
        """Let go what is not stored (any more), and note what is missing."""
        resident = self._bank.digests()  # before the database is read: what enters meanwhile stays
        self._stored = self._store.digests(self._base_model, self._tasks)
        self._compare_at = time.monotonic() + COMPARISON_SECONDS
        gone = resident - self._stored.keys()
        for digest in gone:
            self._bank.remove(digest)
        if gone:
            self._without_room.clear()
        self._refused &= self._stored.keys()
        known = resident | self._refused | self._without_room
        self._missing = [digest for digest in reversed(self._stored) if digest not in known]

    def _load_batch(self) -> None:
        """Load the newest of what is missing; where none of them has room, the others are left to their requests."""
        batch = [self._missing.pop() for _ in range(min(BATCH, len(self._missing)))]
        without_room = 0
        for stored in self._store.read([self._stored[digest] for digest in batch]):
            if self._stopping.is_set():
                return
            without_room += not self._preload(stored)
        if without_room == len(batch):
            self._missing.clear()

    def _preload(self, stored: Stored) -> bool:
        """Make an adapter resident; returns False if there is no room for it."""
        try:
            artifact = stored.load()
            self._check(artifact.manifest)
            if self._bank.put_if_room(artifact):
                return True
            self._without_room.add(stored.digest)
        except Exception as error:  # whatever is wrong with one adapter, the others do not wait for it
            self._refused.add(stored.digest)
            log.warning("adapter_refused", digest=stored.digest, error=str(error))
            return True
        return False

    def _audit(self, digest: str) -> None:
        held = self._bank.peek(digest)
        stored = next(self._store.read([self._stored[digest]]), None)
        if held is None or stored is None or stored.digest != digest:
            return  # evicted, deleted or replaced meanwhile: the next comparison's business
        try:
            expected = self._bank.row_of(stored.load())
        except ArtifactError as error:
            self._bank.remove(digest)
            self._refused.add(digest)
            log.error("adapter_corrupted", digest=digest, where="database", error=error.message)
            return
        if held.manifest != expected.manifest or not held.equals(expected):
            self._bank.remove(digest)
            self._compare_at = 0.0  # load it again
            log.error("adapter_corrupted", digest=digest, where="memory")
            self._on_corrupted(held, _corrupted(digest))


def _corrupted(digest: str) -> ArtifactError:
    return ArtifactError(
        f"Adapter {digest[:16]}... in the engine's memory differs from the stored one, and was thrown away. "
        "Do not use this answer; send the request again.",
        code="adapter_corrupted",
    )
