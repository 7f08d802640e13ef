"""Rows that tests put into the database without going through the api."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from api.database import new_id, now
from api.files.models import File
from api.jobs.models import Checkpoint, Job, JobStatus, TrainingState
from api.models.models import Adapter
from api.models.service import checkpoint_name, model_name
from tests.api.support import Tenant


def add_file(session: Session, tenant: Tenant, **values: Any) -> File:
    """A file without content."""
    file_id = new_id("file-")
    defaults = {
        "id": file_id,
        "project_id": tenant.project_id,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "bytes": 10,
        "sha256": "0" * 64,
        "storage_key": file_id,
        "created_at": now(),
    }
    file = File(**defaults | values)
    session.add(file)
    session.flush()
    return file


def add_job(session: Session, tenant: Tenant, **values: Any) -> Job:
    """A job, in validation unless told otherwise."""
    defaults = {
        "id": new_id("ftjob-"),
        "project_id": tenant.project_id,
        "status": JobStatus.VALIDATING_FILES,
        "model": "tiny",
        "training_file": "file-training",
        "task": "chat",
        "seed": 1,
        "base_model": values.get("model", "tiny"),
        "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
        "adapter": {"method": "uora", "r": 8},
        "created_at": now(),
    }
    job = Job(**defaults | values)
    session.add(job)
    session.flush()
    return job


def add_adapter(
    session: Session, tenant: Tenant, job: Job, *, step: int | None = None, valid_loss: float | None = None
) -> Adapter:
    """The job's final model, or its checkpoint of ``step`` with the checkpoint's row; each answers differently."""
    name = model_name(job.base_model, slug=tenant.slug, suffix=job.suffix, job_id=job.id)
    adapter = Adapter(
        id=name if step is None else checkpoint_name(name, step=step),
        project_id=tenant.project_id,
        job_id=job.id,
        base_model=job.base_model,
        parent=job.warm_start,
        checkpoint_step=step,
        digest=("d" if step is None else str(step)[-1]) * 64,
        manifest={"format": 1, "adapter": job.adapter, "task": job.task},
        artifact=f"vectors of {step}".encode(),
        created_at=now(),
    )
    session.add(adapter)
    if step is not None:
        session.add(
            Checkpoint(
                id=new_id("ftckpt_"),
                job_id=job.id,
                step_number=step,
                model_name=adapter.id,
                metrics={"step": step, "train_loss": 0.5} | ({} if valid_loss is None else {"valid_loss": valid_loss}),
                created_at=now(),
            )
        )
    session.flush()
    return adapter


def add_state(session: Session, job: Job, *, step: int = 20) -> None:
    """What the job would go on from."""
    session.add(TrainingState(job_id=job.id, attempt=1, step=step, bytes=5, state=b"state"))
    session.flush()
