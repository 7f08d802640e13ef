"""Queries of fine-tuned models. The artifact's bytes are not loaded by any of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Select, and_, delete, func, or_, select
from sqlalchemy.orm import undefer

from api.errors import ModelNotFound
from api.jobs.models import Checkpoint
from api.models.models import Adapter
from api.permissions.models import ModelPermission
from api.projects.models import Project
from api.repository import Repository


class AdapterRepository(Repository[Adapter]):
    """Adapters of one project."""

    model = Adapter
    missing = ModelNotFound
    noun = "model"

    def usable(self) -> Select[Adapter]:
        """The project's own, and those that others share with it: to be asked, never to be changed or taken away."""
        return select(Adapter).where(or_(Adapter.project_id == self.project_id, self._shared()))

    def find_usable(self, name: str) -> Adapter | None:
        """One of them, or None."""
        return self.session.scalar(self.usable().where(Adapter.id == name))

    def list_usable(self) -> Sequence[Adapter]:
        """Of them the project's final ones, whose checkpoints are listed with their job, and all shared ones."""
        own_final = and_(Adapter.project_id == self.project_id, Adapter.checkpoint_step.is_(None))
        listed = select(Adapter).where(or_(own_final, self._shared()))
        return self.session.scalars(listed.options(undefer(Adapter.artifact_bytes)).order_by(Adapter.seq.desc())).all()

    def owners(self, adapters: Sequence[Adapter]) -> dict[str, str]:
        """Slugs of the projects that the adapters belong to, by their ids."""
        ids = {adapter.project_id for adapter in adapters}
        found = self.session.execute(select(Project.id, Project.slug).where(Project.id.in_(ids)))
        return {row.id: row.slug for row in found}

    def list_of_job(self, job_id: str) -> Sequence[Adapter]:
        """The final model of a job and its checkpoints."""
        return self.session.scalars(self.visible().where(Adapter.job_id == job_id)).all()

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of the artifacts, by the names of those adapters that there are."""
        sizes = self.visible().with_only_columns(Adapter.id, func.length(Adapter.artifact).label("size"))
        return {row.id: row.size for row in self.session.execute(sizes.where(Adapter.id.in_(names)))}

    def _shared(self) -> ColumnElement[bool]:
        permitted = select(ModelPermission.model).where(ModelPermission.shared_with == self.project_id)
        return Adapter.id.in_(permitted)

    def lock(self, name: str) -> Adapter | None:
        """The row, locked until the transaction ends; None if there is none."""
        return self.session.scalar(self.visible().where(Adapter.id == name).with_for_update())

    def replace(self, adapter: Adapter, source: Adapter) -> bool:
        """Let ``adapter`` answer as ``source`` does; False if it does already."""
        if adapter.digest == source.digest:
            return False
        adapter.task, adapter.manifest = source.task, source.manifest
        adapter.digest, adapter.artifact = source.digest, source.artifact
        return True

    def delete(self, adapters: Sequence[Adapter]) -> None:
        """Delete them and the checkpoints that are named like them."""
        names = [adapter.id for adapter in adapters]
        self.session.execute(delete(Checkpoint).where(Checkpoint.model_name.in_(names)))
        for adapter in adapters:
            self.session.delete(adapter)
