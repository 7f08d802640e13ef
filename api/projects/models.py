"""Tenants and their keys."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class Project(Base, Listed):
    """A tenant. ``slug`` is the organisation part of its models' names."""

    __tablename__ = "projects"

    name: Mapped[str]
    slug: Mapped[str] = mapped_column(unique=True)
    #: The keys of an archived project are refused.
    archived_at: Mapped[datetime | None]
    #: Quotas (``api.quotas``): 0 is no limit, None what the settings say.
    jobs_running: Mapped[int | None] = mapped_column(BigInteger)
    jobs_queued: Mapped[int | None] = mapped_column(BigInteger)
    bytes_stored: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)


class ApiKey(Base, Listed):
    """A key. Only the SHA-256 of the secret is kept; the secret has 256 random bits, so no salt is needed."""

    __tablename__ = "api_keys"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    #: The beginning of the secret, which lists show.
    prefix: Mapped[str]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    #: The secret before the last rotation, which is good until ``previous_until``.
    previous_sha256: Mapped[str | None] = mapped_column(unique=True)
    previous_until: Mapped[datetime | None]
    #: As of ``api.scopes.join_scopes``.
    scopes: Mapped[str]
    #: Whether its ``admin`` scope reaches all projects.
    organization_wide: Mapped[bool] = mapped_column(default=False)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
