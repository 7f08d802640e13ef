"""Jobs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.caller import Caller
from api.errors import JobNotFound
from api.jobs.models import Checkpoint, Job
from api.jobs.repository import JobRepository
from api.jobs.requests import flatten, request_of
from api.models.repository import AdapterRepository

#: Jobs of one comparison at most.
MAX_COMPARED = 50


class ComparedJob(BaseModel):
    """What came of one job."""

    id: str
    status: str
    fine_tuned_model: str | None
    #: Of the last checkpoint; of the latest step for a job without checkpoints; None before the first step.
    metrics: dict[str, Any] | None
    #: Step of the checkpoint with the lowest validation loss.
    best_step: int | None
    trained_tokens: int | None
    #: Size of the model as it is stored; None without a model.
    adapter_bytes: int | None
    #: From the first attempt's begin to the end, pauses included; None for a job that has not begun or not ended.
    seconds: float | None


class JobComparison(BaseModel):
    """Several jobs, and what of their requests is not the same."""

    object: Literal["fine_tuning.job.comparison"] = "fine_tuning.job.comparison"
    jobs: list[ComparedJob]
    #: Parameter -> job -> value, of those parameters that differ; as they are run once that is settled.
    differences: dict[str, dict[str, Any]]


def compare(session: Session, caller: Caller, job_ids: Sequence[str]) -> JobComparison:
    """Compare jobs of the project.

    Raises:
        JobNotFound: one of them is not there.
    """
    jobs = JobRepository(session, caller.project_id)
    found = jobs.find_all(job_ids)
    for job_id in job_ids:
        if job_id not in found:
            raise JobNotFound(f"No such fine-tuning job: {job_id!r}.", param="ids")
    ordered = [found[job_id] for job_id in job_ids]
    checkpoints = jobs.final_checkpoints(ordered)
    models = [job.fine_tuned_model for job in ordered if job.fine_tuned_model]
    sizes = AdapterRepository(session, caller.project_id).sizes(models)
    return JobComparison(
        jobs=[_compared(job, checkpoints.get(job.id), sizes.get(job.fine_tuned_model or "")) for job in ordered],
        differences=_differences(ordered),
    )


def _compared(job: Job, checkpoint: Checkpoint | None, adapter_bytes: int | None) -> ComparedJob:
    ended = job.started_at is not None and job.finished_at is not None
    return ComparedJob(
        id=job.id,
        status=job.status,
        fine_tuned_model=job.fine_tuned_model,
        metrics=job.progress if checkpoint is None else checkpoint.metrics,
        best_step=job.best_step,
        trained_tokens=job.trained_tokens,
        adapter_bytes=adapter_bytes,
        seconds=(job.finished_at - job.started_at).total_seconds() if ended else None,  # type: ignore[operator]
    )


def _differences(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    settings = {job.id: flatten(_settled(job)) for job in jobs}
    names = dict.fromkeys(name for of_job in settings.values() for name in of_job)
    values = {name: {job_id: of_job.get(name) for job_id, of_job in settings.items()} for name in names}
    return {name: by_job for name, by_job in values.items() if any(v != by_job[jobs[0].id] for v in by_job.values())}


def _settled(job: Job) -> dict[str, Any]:
    """The request, with what stands in the place of ``auto`` and of defaults."""
    request, spec = request_of(job), job.training_spec or {}
    request["hyperparameters"] = spec.get("hyperparameters", job.hyperparameters)
    request["peft"]["learning_rate"] = spec.get("learning_rate", job.learning_rate)
    del request["method"]
    return {name: value for name, value in request.items() if name != "metadata"}
