"""What administrators can do with projects and keys: those of a project with its keys, those of all with everything.

An organization-wide key has no project's data as such: it acts for the project that it was made in, as all keys do.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import now
from api.errors import ApiKeyNotFound, InvalidRequest, ProjectNotFound
from api.pagination import Page, PageQuery
from api.projects import repository, service
from api.projects.models import ApiKey, Project
from api.projects.repository import ApiKeyRepository
from api.projects.schemas import AdminKeyCreate, ApiKeyCreate, ApiKeyUpdate, ProjectCreate, ProjectUpdate
from api.scopes import Scope, join_scopes
from api.unit_of_work import UnitOfWork


def get_project(session: Session, caller: Caller, project_id: str) -> Project:
    """A project that the caller administers.

    Raises:
        ProjectNotFound: there is none, or the caller's key is another project's and not organization-wide.
    """
    allowed = caller.organization_wide or project_id == caller.project_id
    project = repository.find(session, project_id) if allowed else None
    if project is None:
        raise ProjectNotFound(f"No such project: {project_id!r}, or none that this key administers.")
    return project


def list_projects(session: Session, caller: Caller, *, query: PageQuery, include_archived: bool) -> Page[Project]:
    """A page of the projects that the caller administers."""
    only = None if caller.organization_wide else caller.project_id
    return repository.page_of_projects(session, query, only=only, include_archived=include_archived)


def create_project(work: UnitOfWork, caller: Caller, body: ProjectCreate) -> Project:
    """Add a project; raises ``OrganizationKeyRequired``, and what ``service.create_project`` does."""
    caller.require_organization()
    project = service.create_project(work.session, body.name, slug=body.slug)
    work.describe(project_id=project.id, data={"name": project.name, "title": project.name})
    return project


def update_project(work: UnitOfWork, caller: Caller, project_id: str, body: ProjectUpdate) -> Project:
    """Rename a project."""
    project = get_project(work.session, caller, project_id)
    project.name = body.name
    work.describe(project_id=project.id, changes_requested={"title": body.name})
    return project


def archive_project(work: UnitOfWork, caller: Caller, project_id: str) -> Project:
    """Refuse the project's keys from now on; its rows stay. Twice is as good as once.

    Raises:
        OrganizationKeyRequired: a project does not archive itself.
        InvalidRequest: it is the project of the key in use, which could not undo it.
        ProjectNotFound: there is none.
    """
    caller.require_organization()
    project = get_project(work.session, caller, project_id)
    if project.id == caller.project_id:
        raise InvalidRequest("The key in use belongs to this project and would be refused from now on; use another's.")
    project.archived_at = project.archived_at or now()
    work.describe(project_id=project.id)
    return project


def list_keys(session: Session, caller: Caller, project_id: str, query: PageQuery) -> Page[ApiKey]:
    """A page of a project's keys."""
    return ApiKeyRepository(session, get_project(session, caller, project_id).id).page(query)


def get_key(session: Session, caller: Caller, project_id: str, key_id: str) -> ApiKey:
    """A key of a project.

    Raises:
        ProjectNotFound: there is none that the caller administers.
        ApiKeyNotFound: the project has no such key, or it is revoked or organization-wide.
    """
    return ApiKeyRepository(session, get_project(session, caller, project_id).id).get(key_id)


def create_key(work: UnitOfWork, caller: Caller, project_id: str, body: ApiKeyCreate) -> tuple[ApiKey, str]:
    """Add a key to a project: its row, and its secret for the only time."""
    project = get_project(work.session, caller, project_id)
    work.describe(project_id=project.id, data={"name": body.name, "scopes": sorted(body.scopes)})
    work.withhold_answer("Rotate the key to have a secret of it.")
    return service.new_api_key(work.session, project.id, name=body.name, scopes=body.scopes, lifetime=body.lifetime)


def update_key(work: UnitOfWork, caller: Caller, project_id: str, key_id: str, body: ApiKeyUpdate) -> ApiKey:
    """Change a key's name, scopes or end; raises what `get_key` does, and ``InvalidRequest`` if it has expired."""
    key = get_key(work.session, caller, project_id, key_id)
    if key.expires_at is not None and key.expires_at <= now():
        raise InvalidRequest(f"The key {key.id} has expired and cannot be changed; make a new one.")
    key.name = body.name or key.name
    if body.scopes is not None:
        key.scopes = join_scopes(body.scopes)
    if body.expires_in_seconds is not None:
        key.expires_at = now() + timedelta(seconds=body.expires_in_seconds)
    changes = body.model_dump(mode="json", exclude_none=True)
    if body.scopes is not None:
        changes["scopes"] = sorted(body.scopes)
    work.describe(project_id=project_id, changes_requested=changes)
    return key


def rotate_key(
    work: UnitOfWork, caller: Caller, project_id: str, key_id: str, *, grace_seconds: int
) -> tuple[ApiKey, str]:
    """Give a key a new secret, shown for the only time; the old one can be used for ``grace_seconds`` more."""
    key = get_key(work.session, caller, project_id, key_id)
    work.describe(project_id=project_id, data={"grace_seconds": grace_seconds})
    return key, _rotate(work, key, grace_seconds)


def revoke_key(work: UnitOfWork, caller: Caller, project_id: str, key_id: str) -> ApiKey:
    """Refuse a key from now on."""
    key = get_key(work.session, caller, project_id, key_id)
    work.describe(project_id=project_id)
    return _revoke(key)


def list_admin_keys(session: Session, caller: Caller, query: PageQuery) -> Page[ApiKey]:
    """A page of the organization-wide keys; raises ``OrganizationKeyRequired``."""
    caller.require_organization()
    return repository.page_of_organization_keys(session, query)


def get_admin_key(session: Session, caller: Caller, key_id: str) -> ApiKey:
    """An organization-wide key.

    Raises:
        OrganizationKeyRequired: the key in use is none.
        ApiKeyNotFound: there is none of that id, or it is revoked.
    """
    caller.require_organization()
    key = repository.find_organization_key(session, key_id)
    if key is None:
        raise ApiKeyNotFound(f"No such organization-wide API key: {key_id!r}.")
    return key


def create_admin_key(work: UnitOfWork, caller: Caller, body: AdminKeyCreate) -> tuple[ApiKey, str]:
    """Add an organization-wide key, which can administer and nothing else: its row, and its secret once."""
    caller.require_organization()
    work.describe(data={"name": body.name, "scopes": [Scope.ADMIN], "organization_wide": True})
    work.withhold_answer("Rotate the key to have a secret of it.")
    return service.new_api_key(
        work.session,
        caller.project_id,
        name=body.name,
        scopes=[Scope.ADMIN],
        organization_wide=True,
        lifetime=body.lifetime,
    )


def rotate_admin_key(work: UnitOfWork, caller: Caller, key_id: str, *, grace_seconds: int) -> tuple[ApiKey, str]:
    """As `rotate_key`, for an organization-wide key."""
    key = get_admin_key(work.session, caller, key_id)
    work.describe(data={"grace_seconds": grace_seconds})
    return key, _rotate(work, key, grace_seconds)


def revoke_admin_key(work: UnitOfWork, caller: Caller, key_id: str) -> ApiKey:
    """Refuse an organization-wide key from now on; raises ``InvalidRequest`` for the one in use."""
    key = get_admin_key(work.session, caller, key_id)
    if key.id == caller.key_id:
        raise InvalidRequest("This is the key in use; revoke it with another organization-wide key.")
    return _revoke(key)


def _rotate(work: UnitOfWork, key: ApiKey, grace_seconds: int) -> str:
    secret = service.new_secret()
    if grace_seconds:
        key.previous_sha256, key.previous_until = key.secret_sha256, now() + timedelta(seconds=grace_seconds)
    else:
        key.previous_sha256 = key.previous_until = None
    key.secret_sha256, key.prefix = service.hash_key(secret), service.shown_prefix(secret)
    work.withhold_answer("Rotate the key once more to have a secret of it.")
    work.session.flush()
    return secret


def _revoke(key: ApiKey) -> ApiKey:
    key.revoked_at = now()
    return key
