"""Projects and keys. The rows above all tenants, so these functions take no project id."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.projects.models import ApiKey, Project


def find_by_name(session: Session, name: str) -> Project | None:
    """The oldest project of that name."""
    return session.scalar(select(Project).where(Project.name == name).order_by(Project.seq).limit(1))


def find_by_slug(session: Session, slug: str) -> Project | None:
    """The project of that slug."""
    return session.scalar(select(Project).where(Project.slug == slug))


def find_key(session: Session, secret_sha256: str) -> tuple[ApiKey, Project] | None:
    """A key, revoked or not, and its project."""
    row = session.execute(
        select(ApiKey, Project)
        .join(Project, Project.id == ApiKey.project_id)
        .where(ApiKey.secret_sha256 == secret_sha256)
    ).one_or_none()
    return None if row is None else (row[0], row[1])


def has_keys(session: Session, project_id: str) -> bool:
    """Whether the project ever had a key."""
    return session.scalar(select(ApiKey.id).where(ApiKey.project_id == project_id).limit(1)) is not None


def touch_key(session: Session, key_id: str, *, at: datetime) -> None:
    """Note that the key was used."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=at))


def revoke_key(session: Session, key_id: str, *, at: datetime) -> bool:
    """Revoke the key; False if there is none that is not revoked yet."""
    statement = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    return bool(session.execute(statement.values(revoked_at=at)).rowcount)  # type: ignore[attr-defined]
