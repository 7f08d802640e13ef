"""Queries of sweeps. A sweep has no row of its own: it is the jobs that name it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import aliased

from api.errors import SweepNotFound
from api.jobs.models import Checkpoint, Job
from api.models.models import Adapter
from api.repository import Repository


class SweepRepository(Repository[Job]):
    """Jobs of one project, by their sweep."""

    model = Job

    def jobs(self, sweep_id: str) -> Sequence[Job]:
        """The sweep's jobs in their order; raises ``SweepNotFound``."""
        jobs = self.session.scalars(self.visible().where(Job.sweep_id == sweep_id).order_by(Job.seq)).all()
        if not jobs:
            raise SweepNotFound(f"No such sweep: {sweep_id!r}.")
        return jobs

    def valid_losses(self, sweep_id: str) -> dict[str, float]:
        """Validation loss by job: of its model as it answers now, or of its latest checkpoint while it has none."""
        final, at_step = aliased(Adapter), aliased(Adapter)
        statement = (
            select(Checkpoint.job_id, Checkpoint.metrics)
            .join(Job, Job.id == Checkpoint.job_id)
            .join(at_step, at_step.id == Checkpoint.model_name)
            .outerjoin(final, final.id == Job.fine_tuned_model)
            .where(Job.project_id == self.project_id, Job.sweep_id == sweep_id)
            .where(or_(Job.fine_tuned_model.is_(None), final.digest == at_step.digest))
            .order_by(Checkpoint.step_number)
        )
        measured = ((job_id, metrics.get("valid_loss")) for job_id, metrics in self.session.execute(statement))
        return {job_id: float(loss) for job_id, loss in measured if loss is not None}
