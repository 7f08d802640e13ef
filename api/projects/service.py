"""Projects and their keys. A plain key is shown once, at creation; only its SHA-256 is kept."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy.orm import Session

from api.database import new_id, now
from api.errors import Conflict, InvalidRequest
from api.projects import repository
from api.projects.models import ApiKey, Project
from api.scopes import EVERY_SCOPE, Scope, join_scopes

KEY_PREFIX = "sk-uora-"
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def create_project(session: Session, name: str, *, slug: str | None = None) -> Project:
    """Add a project.

    Args:
        session: open transaction; the caller commits.
        name: for people.
        slug: organisation part of its models' names; None makes one of ``name``.

    Raises:
        InvalidRequest: the slug has other characters than lower-case letters, digits and hyphens.
        Conflict: the slug is taken.
    """
    slug = _free_slug(session, name) if slug is None else slug
    if not _SLUG.fullmatch(slug):
        raise InvalidRequest(
            f"Found the slug {slug!r}; expected up to 63 lower-case letters, digits and hyphens.", param="slug"
        )
    if repository.find_by_slug(session, slug):
        raise Conflict(f"The slug {slug!r} is taken; choose another.", param="slug", code="slug_taken")
    project = Project(id=new_id("proj_"), name=name, slug=slug)
    session.add(project)
    session.flush()
    return project


def ensure_project(session: Session, *, name: str) -> Project:
    """The project of that name, made if there is none."""
    return repository.find_by_name(session, name) or create_project(session, name)


def create_api_key(
    session: Session,
    project: Project,
    *,
    name: str,
    scopes: Iterable[Scope] = EVERY_SCOPE,
    organization_wide: bool = False,
) -> str:
    """Add a key to the project and return it in plain, for the only time."""
    return new_api_key(session, project.id, name=name, scopes=scopes, organization_wide=organization_wide)[1]


def new_api_key(
    session: Session,
    project_id: str,
    *,
    name: str,
    scopes: Iterable[Scope],
    organization_wide: bool = False,
    lifetime: timedelta | None = None,
) -> tuple[ApiKey, str]:
    """Add a key and return its row and, for the only time, its secret."""
    secret = new_secret()
    key = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=shown_prefix(secret),
        secret_sha256=hash_key(secret),
        scopes=join_scopes(scopes),
        organization_wide=organization_wide,
        expires_at=None if lifetime is None else now() + lifetime,
        created_at=now(),
    )
    session.add(key)
    session.flush()
    return key, secret


def new_secret() -> str:
    """A secret of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def shown_prefix(secret: str) -> str:
    """What is shown of a secret."""
    return secret[: len(KEY_PREFIX) + 4]


def revoke_api_key(session: Session, key: str) -> bool:
    """Refuse the plain key from now on; False if it is unknown or was revoked before."""
    found = repository.find_key(session, hash_key(key))
    return found is not None and repository.revoke_key(session, found[0].id, at=now())


def hash_key(key: str) -> str:
    """What is stored of a key. It has 256 random bits, so one unsalted hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


def _free_slug(session: Session, name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "project"
    if repository.find_by_slug(session, slug) is None:
        return slug
    return f"{slug}-{secrets.token_hex(4)}"
