"""What a run starts from beside its files: the state of the attempt before, or the adapter of another model."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.jobs.models import Job, TrainingState
from api.models.repository import AdapterRepository
from uora.artifact import loads
from uora.errors import UoraError


def load_state(session: Session, job_id: str) -> bytes | None:
    """The state that the job goes on from; None if it begins with step 1."""
    return session.scalar(select(TrainingState.state).where(TrainingState.job_id == job_id))


def load_warm_start(session: Session, job: Job) -> bytes | None:
    """The adapter that the job begins with; None if that is a new one.

    Raises:
        UoraError: the model that it belongs to was deleted, or answers as something else, since the job was made.
        ArtifactError: its bytes are not what its digest says.
    """
    if job.warm_start is None:
        return None
    adapter = AdapterRepository(session, job.project_id).find(job.warm_start)
    if adapter is None:
        raise UoraError(
            f"The model {job.warm_start}, from which this job was to start, was deleted after the job was created. "
            "Create the job again from another model.",
            code="warm_start_not_found",
            param="model",
        )
    artifact = adapter.artifact
    if loads(artifact).manifest.digest != job.warm_start_digest:
        raise UoraError(
            f"The model {job.warm_start}, from which this job was to start, answers as another checkpoint than when "
            "the job was created. Create the job again to start from what it is now, or from the checkpoint's name.",
            code="warm_start_changed",
            param="model",
        )
    return artifact
