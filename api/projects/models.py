"""Tenants and their keys."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class Project(Base, Listed):
    """A tenant. ``slug`` is the organisation part of its models' names."""

    __tablename__ = "projects"

    name: Mapped[str]
    slug: Mapped[str] = mapped_column(unique=True)


class ApiKey(Base, Listed):
    """A key. Only the SHA-256 of the secret is kept; the secret has 256 random bits, so no salt is needed."""

    __tablename__ = "api_keys"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
