"""Projects and keys. The rows above all tenants, so the functions here take no project id."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Select, or_, select, update
from sqlalchemy.orm import Session

from api.errors import ApiKeyNotFound
from api.pagination import Page, PageQuery, paginate
from api.projects.models import ApiKey, Project
from api.repository import Repository


class ApiKeyRepository(Repository[ApiKey]):
    """Keys of one project, without the organization-wide ones: these are not its administrators' to change."""

    model = ApiKey
    missing = ApiKeyNotFound
    noun = "API key"

    def every(self) -> Select[ApiKey]:
        """The revoked ones too."""
        return super().every().where(ApiKey.organization_wide.is_(False))

    def visible(self) -> Select[ApiKey]:
        """All that are not revoked."""
        return self.every().where(ApiKey.revoked_at.is_(None))


def find(session: Session, project_id: str) -> Project | None:
    """The project of that id."""
    return session.scalar(select(Project).where(Project.id == project_id))


def find_by_name(session: Session, name: str) -> Project | None:
    """The oldest project of that name."""
    return session.scalar(select(Project).where(Project.name == name).order_by(Project.seq).limit(1))


def find_by_slug(session: Session, slug: str) -> Project | None:
    """The project of that slug."""
    return session.scalar(select(Project).where(Project.slug == slug))


def page_of_projects(
    session: Session, query: PageQuery, *, only: str | None = None, include_archived: bool = False
) -> Page[Project]:
    """A page of all projects, or of the one with the id ``only``."""
    every = select(Project) if only is None else select(Project).where(Project.id == only)
    shown = every if include_archived else every.where(Project.archived_at.is_(None))
    return paginate(session, shown, model=Project, query=query, cursors=every)


def page_of_organization_keys(session: Session, query: PageQuery) -> Page[ApiKey]:
    """A page of the organization-wide keys that are not revoked."""
    every = select(ApiKey).where(ApiKey.organization_wide.is_(True))
    return paginate(session, every.where(ApiKey.revoked_at.is_(None)), model=ApiKey, query=query, cursors=every)


def find_organization_key(session: Session, key_id: str) -> ApiKey | None:
    """The organization-wide key of that id, unless it is revoked."""
    statement = select(ApiKey).where(ApiKey.id == key_id, ApiKey.organization_wide.is_(True))
    return session.scalar(statement.where(ApiKey.revoked_at.is_(None)))


def find_key(session: Session, secret_sha256: str) -> tuple[ApiKey, Project] | None:
    """The key whose secret, or whose secret before the last rotation, has this hash, and its project.

    Revoked and expired ones are found too: it is for the caller to refuse them.
    """
    row = session.execute(
        select(ApiKey, Project)
        .join(Project, Project.id == ApiKey.project_id)
        .where(or_(ApiKey.secret_sha256 == secret_sha256, ApiKey.previous_sha256 == secret_sha256))
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
