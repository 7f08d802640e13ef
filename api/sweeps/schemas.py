"""Sweeps on the wire: a job's body with the values to try, and what became of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.jobs.models import Job, JobStatus
from api.jobs.schemas import MAX_SEED, JobCreate

MAX_JOBS = 64
#: The first of these that one of its jobs has is the sweep's: what goes on before what has ended.
STATUS_ORDER = (
    *(JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.VALIDATING_FILES, JobStatus.PAUSED),
    *(JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED),
)

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
LearningRate = Annotated[float, Field(gt=0.0, le=100.0)]


class SweepGrid(BaseModel):
    """What to try: every seed with every learning rate. What is left out is the same for all jobs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    seeds: tuple[Seed, ...] = ()
    #: Each in the place of ``peft.learning_rate``.
    learning_rates: tuple[LearningRate, ...] = ()

    @model_validator(mode="after")
    def _has_a_good_size(self) -> Self:
        for values in (self.seeds, self.learning_rates):
            if len(set(values)) < len(values):
                raise ValueError(f"each value once, unlike in {list(values)}")
        size = len(self.seeds or (None,)) * len(self.learning_rates or (None,))
        if not (self.seeds or self.learning_rates) or size > MAX_JOBS:
            raise ValueError(f"seeds, learning_rates or both, of 1 to {MAX_JOBS} combinations in all")
        return self

    def combinations(self) -> Iterator[tuple[int | None, float | None]]:
        """Seed and learning rate of each job; None for what is not tried."""
        return itertools.product(self.seeds or (None,), self.learning_rates or (None,))


class SweepCreate(JobCreate):
    """Body of a new sweep."""

    sweep: SweepGrid


class SweepResult(BaseModel):
    """What became of one combination."""

    job: str
    seed: int
    #: As it was tried, before the multiplier; None for the method's default.
    learning_rate: float | None
    status: str
    #: Of the job's model as it answers now; of the latest checkpoint while there is no model.
    valid_loss: float | None


class Sweep(BaseModel):
    """Jobs that differ in nothing but their seeds and learning rates."""

    id: str
    object: Literal["fine_tuning.sweep"] = "fine_tuning.sweep"
    created_at: int
    jobs: list[str]
    status: str
    #: The succeeded one of the lowest validation loss.
    best_job: str | None
    results: list[SweepResult]

    @classmethod
    def of(cls, sweep_id: str, jobs: Sequence[Job], *, valid_losses: dict[str, float]) -> Self:
        """Show the jobs of a sweep, of which there is one at least, with the losses that were measured."""
        succeeded = [job.id for job in jobs if job.status == JobStatus.SUCCEEDED and job.id in valid_losses]
        statuses = {job.status for job in jobs}
        return cls(
            id=sweep_id,
            created_at=int(jobs[0].created_at.timestamp()),
            jobs=[job.id for job in jobs],
            status=next(status for status in STATUS_ORDER if status in statuses),
            best_job=min(succeeded, key=lambda job_id: valid_losses[job_id], default=None),
            results=[
                SweepResult(
                    job=job.id,
                    seed=job.seed,
                    learning_rate=job.learning_rate,
                    status=job.status,
                    valid_loss=valid_losses.get(job.id),
                )
                for job in jobs
            ],
        )
