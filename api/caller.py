"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """The project that a request acts for, and the key it came with."""

    project_id: str
    project_slug: str
    key_id: str
