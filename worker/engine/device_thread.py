"""What the threads have in common that answer with a model: they wait for requests and take turns on the device."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from weakref import WeakKeyDictionary

from uora.serving.rows import Row


def _tell_nobody(_rows: float) -> None:
    """Without anybody who counts."""


class DeviceThread(ABC):
    """A thread that answers requests until it is stopped."""

    def __init__(self, name: str, turn: threading.Lock | None = None) -> None:
        """
        Args:
            name: the thread's.
            turn: held while it computes, by whoever else computes on the same device too.
        """
        self._turn = turn or threading.Lock()
        #: Told how many are computed together, each time.
        self.on_batch: Callable[[float], None] = _tell_nobody
        #: Guards and announces what waits, and that the thread is to stop.
        self._changed = threading.Condition()
        self._stopping = False
        self._condemned: WeakKeyDictionary[Row, Exception] = WeakKeyDictionary()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it computes now; all requests that are not answered then are told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def end_holders(self, row: Row, error: Exception) -> None:
        """End all answers that have this very row, those that are yet to come too, before they get any further."""
        self._condemned[row] = error

    @abstractmethod
    def _run(self) -> None:
        """Answer until ``_stopping``."""
