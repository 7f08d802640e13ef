"""Sharing models with other projects: they may ask them, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import new_id, now
from api.errors import InvalidRequest, ModelNotFound
from api.models.repository import AdapterRepository
from api.pagination import Page, PageQuery
from api.permissions.models import ModelPermission
from api.permissions.repository import PermissionRepository


def create(session: Session, caller: Caller, *, model: str, project_ids: Sequence[str]) -> list[ModelPermission]:
    """Let projects use a model of the caller's; one that has the permission keeps the one it has.

    Raises:
        ModelNotFound: the project has no such model.
        InvalidRequest: an id that no other project has.
    """
    # Locked, so that two callers do not give the same permission at once.
    if AdapterRepository(session, caller.project_id).lock(model) is None:
        raise _no_model(model)
    permissions = PermissionRepository(session, caller.project_id)
    wanted = list(dict.fromkeys(project_ids))
    known = permissions.known_projects(wanted)
    for place, project_id in enumerate(wanted):
        if project_id not in known or project_id == caller.project_id:
            found = "the model's own project" if project_id == caller.project_id else f"{project_id!r}"
            raise InvalidRequest(
                f"project_ids: found {found}; expected ids of other projects of this service.",
                param=f"project_ids[{place}]",
            )
    had = permissions.of_projects(model, wanted)
    return [had.get(project_id) or _add(permissions, model, project_id) for project_id in wanted]


def list_permissions(
    session: Session, caller: Caller, *, model: str, query: PageQuery, project_id: str | None
) -> Page[ModelPermission]:
    """A page of a model's permissions; raises ``ModelNotFound``."""
    _check_model(session, caller, model)
    return PermissionRepository(session, caller.project_id).page_of(model, query, project_id=project_id)


def delete(session: Session, caller: Caller, *, model: str, permission_id: str) -> None:
    """Take a permission away: the other project's next request finds no such model.

    Raises:
        ModelNotFound: the project has no such model.
        PermissionNotFound: the model has no such permission.
    """
    _check_model(session, caller, model)
    permissions = PermissionRepository(session, caller.project_id)
    permissions.delete(permissions.get_of(model, permission_id))


def _add(permissions: PermissionRepository, model: str, project_id: str) -> ModelPermission:
    return permissions.add(
        ModelPermission(
            id=new_id("cp_"),
            created_at=now(),
            project_id=permissions.project_id,
            model=model,
            shared_with=project_id,
        )
    )


def _check_model(session: Session, caller: Caller, model: str) -> None:
    if AdapterRepository(session, caller.project_id).find(model) is None:
        raise _no_model(model)


def _no_model(model: str) -> ModelNotFound:
    return ModelNotFound(
        f"The project has no model {model!r}; only a fine-tuned model's own project can share it.", param="model"
    )
