"""Who asks."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

#: How long a good key is believed to be good.
CALLER_SECONDS = 1.0
#: Keys that are remembered at once.
MAX_CALLERS = 10_000


@dataclass(frozen=True)
class Caller:
    """The project that a request acts for, and the key it came with."""

    project_id: str
    project_slug: str
    key_id: str


class RecentCallers:
    """Who sent what headers a moment ago; refusals are not kept, and no key is."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[Caller, float]] = {}

    def find(self, sent: str) -> Caller | None:
        """Who it was, unless that is too long ago."""
        kept = self._kept.get(_digest(sent))
        return kept[0] if kept and time.monotonic() - kept[1] < CALLER_SECONDS else None

    def keep(self, sent: str, caller: Caller, *, found_at: float) -> None:
        """Remember who it is, as of ``found_at`` on the monotonic clock."""
        if len(self._kept) >= MAX_CALLERS:
            self._kept.clear()
        self._kept[_digest(sent)] = (caller, found_at)


def _digest(sent: str) -> bytes:
    return hashlib.sha256(sent.encode(errors="surrogateescape")).digest()
