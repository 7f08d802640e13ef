"""Queries of fine-tuned models. The artifact's bytes are not loaded by any of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import delete, func

from api.errors import ModelNotFound
from api.jobs.models import Checkpoint
from api.models.models import Adapter
from api.repository import Repository


class AdapterRepository(Repository[Adapter]):
    """Adapters of one project."""

    model = Adapter
    missing = ModelNotFound
    noun = "model"

    def list_final(self) -> Sequence[Adapter]:
        """All final models, newest first; checkpoints are listed with their job."""
        final = self.visible().where(Adapter.checkpoint_step.is_(None))
        return self.session.scalars(final.order_by(Adapter.seq.desc())).all()

    def list_of_job(self, job_id: str) -> Sequence[Adapter]:
        """The final model of a job and its checkpoints."""
        return self.session.scalars(self.visible().where(Adapter.job_id == job_id)).all()

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of the artifacts, by the names of those adapters that there are."""
        sizes = self.visible().with_only_columns(Adapter.id, func.length(Adapter.artifact).label("size"))
        return {row.id: row.size for row in self.session.execute(sizes.where(Adapter.id.in_(names)))}

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
