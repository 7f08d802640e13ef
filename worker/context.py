"""What a worker process holds while it lives: settings, database, queue, files. Built once, at the first task."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from api.database import make_engine, make_sessions
from api.queue import CeleryQueue, TaskName, TaskQueue
from api.settings import Settings
from api.storage import LocalStore
from worker.lease import Sessions
from worker.spare import SpareChild


class CountingQueue(TaskQueue, Protocol):
    """A queue that also says how many of its messages nobody has taken yet."""

    def waiting(self, task: TaskName) -> int:
        """Messages of the task's queue that wait."""


@dataclass(frozen=True)
class Resources:
    """What tasks work with."""

    settings: Settings
    sessions: Sessions
    queue: CountingQueue
    storage: LocalStore
    #: Names this process in leases and logs.
    owner: str
    #: Set when the worker is told to leave: whoever trains stops and gives the job back.
    stopping: threading.Event
    #: The process of the next training, if it is kept waiting.
    spare: SpareChild


#: Outside of `resources`, so that a signal handler that sets it never has to build them.
STOPPING = threading.Event()


def build(settings: Settings) -> Resources:
    """Make the resources of one process."""
    return Resources(
        settings=settings,
        sessions=make_sessions(make_engine(settings.database_url)),
        queue=CeleryQueue(settings),
        storage=LocalStore(settings.storage_dir),
        owner=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
        stopping=STOPPING,
        spare=SpareChild(STOPPING),
    )


@cache
def resources() -> Resources:
    """The resources of this process."""
    return build(Settings())
