"""``/v1/organization``: projects and keys, as ``client.admin.organization`` has them.

Ours, in the same style: making a project's key, and rotating keys.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from api.auth import CallerDep
from api.dependencies import PageParams, ReadSessionDep, WorkDep
from api.pagination import ListObject, PageQuery
from api.projects import administration
from api.projects.schemas import (
    AdminApiKey,
    AdminApiKeyDeleted,
    AdminKeyCreate,
    ApiKeyCreate,
    ApiKeyRotate,
    ApiKeyUpdate,
    NewAdminApiKey,
    NewProjectApiKey,
    ProjectApiKey,
    ProjectApiKeyDeleted,
    ProjectCreate,
    ProjectObject,
    ProjectUpdate,
)
from api.routing import Router

router = Router(prefix="/organization", tags=["administration"])

AdminPage = Annotated[PageQuery, Depends(PageParams(default_limit=20, max_limit=100))]


@router.post("/projects")
def create_project(body: ProjectCreate, caller: CallerDep, work: WorkDep) -> ProjectObject:
    """Add a project. Needs an organization-wide key."""
    return ProjectObject.of(administration.create_project(work, caller, body))


@router.get("/projects")
def list_projects(
    caller: CallerDep,
    session: ReadSessionDep,
    query: AdminPage,
    include_archived: Annotated[bool, Query()] = False,
) -> ListObject[ProjectObject]:
    """List the projects that the key administers."""
    page = administration.list_projects(session, caller, query=query, include_archived=include_archived)
    return ListObject.of(page, ProjectObject.of)


@router.get("/projects/{project_id}")
def get_project(project_id: str, caller: CallerDep, session: ReadSessionDep) -> ProjectObject:
    """Describe one project."""
    return ProjectObject.of(administration.get_project(session, caller, project_id))


@router.post("/projects/{project_id}")
def update_project(project_id: str, body: ProjectUpdate, caller: CallerDep, work: WorkDep) -> ProjectObject:
    """Rename a project."""
    return ProjectObject.of(administration.update_project(work, caller, project_id, body))


@router.post("/projects/{project_id}/archive")
def archive_project(project_id: str, caller: CallerDep, work: WorkDep) -> ProjectObject:
    """Refuse a project's keys from now on. Needs an organization-wide key."""
    return ProjectObject.of(administration.archive_project(work, caller, project_id))


@router.post("/projects/{project_id}/api_keys")
def create_api_key(project_id: str, body: ApiKeyCreate, caller: CallerDep, work: WorkDep) -> NewProjectApiKey:
    """Add a key to a project. Only this answer has its secret."""
    key, secret = administration.create_key(work, caller, project_id, body)
    return NewProjectApiKey.of(key, value=secret)


@router.get("/projects/{project_id}/api_keys")
def list_api_keys(
    project_id: str, caller: CallerDep, session: ReadSessionDep, query: AdminPage
) -> ListObject[ProjectApiKey]:
    """List a project's keys, newest first, without the organization-wide ones."""
    return ListObject.of(administration.list_keys(session, caller, project_id, query), ProjectApiKey.of)


@router.get("/projects/{project_id}/api_keys/{key_id}")
def get_api_key(project_id: str, key_id: str, caller: CallerDep, session: ReadSessionDep) -> ProjectApiKey:
    """Describe one key of a project."""
    return ProjectApiKey.of(administration.get_key(session, caller, project_id, key_id))


@router.post("/projects/{project_id}/api_keys/{key_id}")
def update_api_key(project_id: str, key_id: str, body: ApiKeyUpdate, caller: CallerDep, work: WorkDep) -> ProjectApiKey:
    """Change a key's name, scopes or end."""
    return ProjectApiKey.of(administration.update_key(work, caller, project_id, key_id, body))


@router.post("/projects/{project_id}/api_keys/{key_id}/rotate")
def rotate_api_key(
    project_id: str, key_id: str, caller: CallerDep, work: WorkDep, body: ApiKeyRotate | None = None
) -> NewProjectApiKey:
    """Give a key a new secret, which only this answer has."""
    grace = (body or ApiKeyRotate()).grace_seconds
    key, secret = administration.rotate_key(work, caller, project_id, key_id, grace_seconds=grace)
    return NewProjectApiKey.of(key, value=secret)


@router.delete("/projects/{project_id}/api_keys/{key_id}")
def delete_api_key(project_id: str, key_id: str, caller: CallerDep, work: WorkDep) -> ProjectApiKeyDeleted:
    """Revoke a key of a project."""
    return ProjectApiKeyDeleted(id=administration.revoke_key(work, caller, project_id, key_id).id)


@router.post("/admin_api_keys")
def create_admin_api_key(body: AdminKeyCreate, caller: CallerDep, work: WorkDep) -> NewAdminApiKey:
    """Add an organization-wide admin key. Only this answer has its secret."""
    key, secret = administration.create_admin_key(work, caller, body)
    return NewAdminApiKey.of(key, value=secret)


@router.get("/admin_api_keys")
def list_admin_api_keys(caller: CallerDep, session: ReadSessionDep, query: AdminPage) -> ListObject[AdminApiKey]:
    """List the organization-wide keys."""
    return ListObject.of(administration.list_admin_keys(session, caller, query), AdminApiKey.of)


@router.get("/admin_api_keys/{key_id}")
def get_admin_api_key(key_id: str, caller: CallerDep, session: ReadSessionDep) -> AdminApiKey:
    """Describe one organization-wide key."""
    return AdminApiKey.of(administration.get_admin_key(session, caller, key_id))


@router.post("/admin_api_keys/{key_id}/rotate")
def rotate_admin_api_key(
    key_id: str, caller: CallerDep, work: WorkDep, body: ApiKeyRotate | None = None
) -> NewAdminApiKey:
    """Give an organization-wide key a new secret, which only this answer has."""
    grace = (body or ApiKeyRotate()).grace_seconds
    key, secret = administration.rotate_admin_key(work, caller, key_id, grace_seconds=grace)
    return NewAdminApiKey.of(key, value=secret)


@router.delete("/admin_api_keys/{key_id}")
def delete_admin_api_key(key_id: str, caller: CallerDep, work: WorkDep) -> AdminApiKeyDeleted:
    """Revoke an organization-wide key."""
    return AdminApiKeyDeleted(id=administration.revoke_admin_key(work, caller, key_id).id)
