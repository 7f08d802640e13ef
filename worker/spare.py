"""One training process that has imported everything before there is a job for it: ``UORA_SPARE_TRAINER``.

Importing torch and transformers takes longer than all else before the first step. A spare is started when a job has
ended, not while one trains, for it would take its cores. Its stdin is this process's, so it ends with it.
"""

from __future__ import annotations

import threading
from datetime import timedelta

from worker.child_process import ChildProcess


class SpareChild:
    """A place for one child that waits for its request.

    Args:
        stopping: when it is set, the spare is ended, and none is started any more.
    """

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None
        self._watch = threading.Thread(target=self._close_when_stopping, daemon=True)

    def take(self) -> ChildProcess:
        """The spare, which is the caller's from now on; a new child if there is none, or it has died."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None and child.is_alive:
            return child
        _end(child)
        return ChildProcess.start()

    def refill(self) -> None:
        """Have a spare that is alive, unless this worker is leaving."""
        with self._lock:
            if self._stopping.is_set() or (self._child is not None and self._child.is_alive):
                return
            _end(self._child)
            self._child = ChildProcess.start()
            if self._watch.ident is None:  # the first one
                self._watch.start()

    def close(self) -> None:
        """End the spare."""
        with self._lock:
            child, self._child = self._child, None
        _end(child)

    def _close_when_stopping(self) -> None:
        self._stopping.wait()
        self.close()


def _end(child: ChildProcess | None) -> None:
    if child is not None:
        child.stop(timedelta(0))  # it has nothing to tidy up
