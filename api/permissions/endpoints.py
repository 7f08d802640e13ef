"""``/v1/fine_tuning/checkpoints/{model}/permissions``. Names may have slashes: hence ``:path``."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from api.auth import CallerDep
from api.dependencies import ReadSessionDep, SessionDep
from api.pagination import ListObject, Order, PageQuery
from api.permissions import service
from api.permissions.schemas import Permission, PermissionCreate, PermissionDeleted, PermissionOrder
from api.routing import Router

router = Router(prefix="/fine_tuning/checkpoints", tags=["fine-tuning"])


@router.get("/{model:path}/permissions")
def list_permissions(
    model: str,
    caller: CallerDep,
    session: ReadSessionDep,
    after: Annotated[str | None, Query(max_length=256)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    order: PermissionOrder = PermissionOrder.DESCENDING,
    project_id: Annotated[str | None, Query(max_length=256)] = None,
) -> ListObject[Permission]:
    """List which projects may use a model of this project."""
    by_age = Order.DESC if order is PermissionOrder.DESCENDING else Order.ASC
    query = PageQuery(after=after, limit=limit, order=by_age)
    page = service.list_permissions(session, caller, model=model, query=query, project_id=project_id)
    return ListObject.of(page, Permission.of)


@router.post("/{model:path}/permissions")
def create_permissions(
    model: str, body: PermissionCreate, caller: CallerDep, session: SessionDep
) -> ListObject[Permission]:
    """Let other projects use a model of this project."""
    made = service.create(session, caller, model=model, project_ids=body.project_ids)
    return ListObject.whole([Permission.of(permission) for permission in made])


@router.delete("/{model:path}/permissions/{permission_id}")
def delete_permission(model: str, permission_id: str, caller: CallerDep, session: SessionDep) -> PermissionDeleted:
    """Take a permission away, at once."""
    service.delete(session, caller, model=model, permission_id=permission_id)
    return PermissionDeleted(id=permission_id)
