"""How a server ends: it says so first, goes on for a moment, and then takes nothing new and ends what it has."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Stopping:
    """Whether the process was told to stop; true from then on."""

    def __init__(self) -> None:
        self._told = False

    def __bool__(self) -> bool:
        return self._told

    def on_signal(self, action: Callable[[], None], *, delay: timedelta) -> None:
        """Listen for SIGINT and SIGTERM, in the server's own event loop; elsewhere, as in tests, do nothing.

        Args:
            action: called in the loop as soon as the signal is there. The server itself acts on it only once all
                requests have ended, and before the lifespan does.
            delay: from then until the server hears of it, and takes no more connections. A second signal is heard at
                once.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            servers = signal.getsignal(number)
            if callable(servers):  # else it does not end its requests first, or is told in another way
                signal.signal(number, self._handler(loop, servers, action, delay.total_seconds()))

    def _handler(
        self, loop: asyncio.AbstractEventLoop, servers: Handler, action: Callable[[], None], delay: float
    ) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            first, self._told = not self._told, True
            if first:
                loop.call_soon_threadsafe(action)
            if first and delay:
                loop.call_soon_threadsafe(loop.call_later, delay, servers, number, None)
            else:
                servers(number, frame)

        return handle
