"""Answers of the health routes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Check(BaseModel):
    """One part that requests need."""

    status: Literal["ok", "unavailable"]
    detail: str


class Readiness(BaseModel):
    """All parts."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, Check]
