"""Queries of permissions: the owner's view. What they let others do is ``AdapterRepository.usable``."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, select

from api.errors import PermissionNotFound
from api.pagination import Page, PageQuery, paginate
from api.permissions.models import ModelPermission
from api.projects.models import Project
from api.repository import Repository


class PermissionRepository(Repository[ModelPermission]):
    """Permissions of one project's models."""

    model = ModelPermission
    missing = PermissionNotFound
    noun = "permission"

    def page_of(self, model: str, query: PageQuery, *, project_id: str | None = None) -> Page[ModelPermission]:
        """A page of one model's permissions, or of those of them that one project has."""
        criteria: list[ColumnElement[bool]] = [ModelPermission.model == model]
        if project_id is not None:
            criteria.append(ModelPermission.shared_with == project_id)
        return paginate(
            self.session,
            self.visible().where(*criteria),
            model=ModelPermission,
            query=query,
            cursors=self.visible().where(ModelPermission.model == model),
        )

    def of_projects(self, model: str, project_ids: Collection[str]) -> dict[str, ModelPermission]:
        """A model's permissions by the project that has them."""
        wanted = self.visible().where(
            ModelPermission.model == model, ModelPermission.shared_with.in_(list(project_ids))
        )
        return {permission.shared_with: permission for permission in self.session.scalars(wanted)}

    def known_projects(self, project_ids: Collection[str]) -> set[str]:
        """Those of the ids that projects have."""
        return set(self.session.scalars(select(Project.id).where(Project.id.in_(list(project_ids)))))

    def get_of(self, model: str, permission_id: str) -> ModelPermission:
        """One of a model's permissions; raises ``PermissionNotFound``."""
        wanted = self.visible().where(ModelPermission.model == model, ModelPermission.id == permission_id)
        found = self.session.scalar(wanted)
        if found is None:
            raise PermissionNotFound(f"The model {model} has no permission {permission_id!r}.")
        return found

    def delete(self, permission: ModelPermission) -> None:
        """Take it away."""
        self.session.delete(permission)
