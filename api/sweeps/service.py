"""What can be done with sweeps."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import new_id
from api.errors import InvalidRequest
from api.jobs import service as jobs
from api.jobs.schemas import MAX_SEED, MAX_SUFFIX, JobCreate
from api.quotas import service as quotas
from api.settings import Settings
from api.sweeps.repository import SweepRepository
from api.sweeps.schemas import Sweep, SweepCreate
from api.unit_of_work import UnitOfWork


def create(work: UnitOfWork, caller: Caller, *, body: SweepCreate, settings: Settings) -> Sweep:
    """Insert one job for each combination: all of them, or none.

    Raises:
        ModelNotFound: neither a base model nor one of the project's.
        FileNotFound: a file that is not in the project.
        JobQuotaExceeded: the project may not have as many more jobs in the queue.
        InvalidRequest: what no job could be made of, or values that are given for all jobs and for each.
    """
    _check(body)
    sweep_id = new_id("ftsweep-")
    if body.seed is None:  # losses of other seeds would say little of learning rates
        body = body.model_copy(update={"seed": secrets.randbelow(MAX_SEED + 1)})
    combinations = list(body.sweep.combinations())
    quotas.check_jobs(work.session, caller, added=len(combinations))
    for seed, learning_rate in combinations:
        one = _job_body(body, seed=seed, learning_rate=learning_rate)
        jobs.create(work, caller, body=one, settings=settings, sweep_id=sweep_id)
    return get(work.session, caller, sweep_id)


def get(session: Session, caller: Caller, sweep_id: str) -> Sweep:
    """One sweep; raises ``SweepNotFound``."""
    sweeps = SweepRepository(session, caller.project_id)
    return Sweep.of(sweep_id, sweeps.jobs(sweep_id), valid_losses=sweeps.valid_losses(sweep_id))


def _check(body: SweepCreate) -> None:
    if body.validation_file is None:
        raise InvalidRequest(
            "A sweep compares validation losses; give a validation_file.",
            param="validation_file",
            code="missing_required_parameter",
        )
    twice = {
        "seed": body.seed is not None and body.sweep.seeds,
        "peft.learning_rate": body.peft.learning_rate is not None and body.sweep.learning_rates,
    }
    for param, given in twice.items():
        if given:
            raise InvalidRequest(f"Found {param} and values of it in sweep; give one of them.", param=param)


def _job_body(body: SweepCreate, *, seed: int | None, learning_rate: float | None) -> JobCreate:
    values: dict[str, Any] = {"suffix": _suffix(body.suffix, seed=seed, learning_rate=learning_rate)}
    if seed is not None:
        values["seed"] = seed
    if learning_rate is not None:
        values["peft"] = body.peft.model_copy(update={"learning_rate": learning_rate})
    return body.model_copy(update=values)


def _suffix(suffix: str | None, *, seed: int | None, learning_rate: float | None) -> str:
    """The suffix, and the values that this job tries: its model tells by its name what it is."""
    tried = {"s": seed, "lr": learning_rate}
    parts = [suffix, *(f"{letters}{value}" for letters, value in tried.items() if value is not None)]
    name = "-".join(part for part in parts if part)
    if len(name) > MAX_SUFFIX:
        raise InvalidRequest(
            f"Found a suffix that makes {name!r}, of {len(name)} characters; expected at most {MAX_SUFFIX}. Give a "
            "shorter one.",
            param="suffix",
        )
    return name
