"""The embedded broker: a folder of messages, one file each, for one machine without a Redis.

kombu's filesystem transport with the three places made atomic that several processes can meet in.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from time import time_ns
from typing import Any

from kombu.transport import filesystem
from kombu.utils import json

_dumps: Callable[[Any], str] = json.dumps
_loads: Callable[[str], Any] = json.loads


class _Channel(filesystem.Channel):
    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override] # as in kombu
        # kombu opens the file first and fills it later: another process may take it while it is still
        # empty, and a message that is no JSON ends the worker. A rename shows it whole or not at all.
        folder = Path(self.data_folder_out)
        name = f"{time_ns():020d}_{uuid.uuid4()}"
        unseen = folder / f"{name}.writing"
        unseen.write_text(_dumps(payload), encoding="utf-8")
        unseen.rename(folder / f"{name}.{queue}.msg")

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        # kombu moves the file to the system's temporary folder, which may be another disk; there a move is
        # a copy, and two processes can both make it. A rename in place succeeds for one of them.
        folder = Path(self.data_folder_in)
        for name in sorted(os.listdir(folder)):
            if name.partition(".")[2] != f"{queue}.msg":
                continue
            taken = folder / f"{name}.taken"
            try:
                (folder / name).rename(taken)
            except FileNotFoundError:
                continue
            message = _loads(taken.read_text(encoding="utf-8"))
            taken.unlink()
            return message
        raise Empty

    def _queue_bind(self, *_: Any) -> None:
        # Messages go through the default exchange, straight to the queue, so that no binding is ever looked
        # up; kombu's table of them can be read half-written.
        pass


class Transport(filesystem.Transport):
    """kombu transport of the embedded broker."""

    Channel = _Channel
