"""Engines, as they report themselves."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict

from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class Load(TypedDict):
    """What an engine is busy with: sequences decoded now, sequences that wait, and adapters in memory."""

    running: int
    waiting: int
    resident: int


class EngineReplica(Base, Listed):
    """One engine process, from the moment it can answer. Its heartbeat says that it still can.

    ``heartbeat_at`` has no index: a heartbeat each second would write it too, for a table of a few rows.
    """

    __tablename__ = "engines"

    #: Where the api reaches it.
    url: Mapped[str]
    base_model: Mapped[str]
    base_digest: Mapped[str]
    #: Sequences that it decodes together.
    capacity: Mapped[int]
    heartbeat_at: Mapped[datetime]
    running: Mapped[int] = mapped_column(default=0)
    waiting: Mapped[int] = mapped_column(default=0)
    resident: Mapped[int] = mapped_column(default=0)
