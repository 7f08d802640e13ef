"""What can be done with fine-tuning jobs."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import assert_never

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import new_id, now
from api.errors import InvalidRequest, JobNotCancellable, ModelNotFound, UnsupportedParameter
from api.files.models import File
from api.files.repository import FileRepository
from api.files.schemas import Purpose
from api.jobs.models import Checkpoint, Job, JobEvent, JobStatus
from api.jobs.repository import JobRepository, add_event, move_job, request_cancel
from api.jobs.schemas import MAX_SEED, JobCreate
from api.pagination import Page, PageQuery
from api.queue import TaskName
from api.unit_of_work import UnitOfWork
from uora.spec import HyperparameterRequest

#: A job moves at most twice while it is being cancelled; more rounds mean a fault.
CANCEL_ROUNDS = 5


def create(work: UnitOfWork, caller: Caller, *, body: JobCreate, base_models: Collection[str]) -> Job:
    """Insert the job and ring for its validation.

    Raises:
        ModelNotFound: an unknown base model.
        FileNotFound: a file that is not in the project.
        InvalidRequest: a file that cannot be used, or what is not offered.
    """
    _refuse_unsupported(body)
    if body.model not in base_models:
        raise ModelNotFound(
            f"The model {body.model!r} cannot be fine-tuned; expected one of {sorted(base_models)}.",
            param="model",
        )
    files = FileRepository(work.session, caller.project_id)
    for param, file_id in (("training_file", body.training_file), ("validation_file", body.validation_file)):
        if file_id is not None:
            _check_file(files.lock(file_id, shared=True, param=param), param=param)
    job = JobRepository(work.session, caller.project_id).add(_new_job(caller, body))
    add_event(work.session, job.id, message=f"Created fine-tuning job: {job.id}")
    work.ring(TaskName.VALIDATE, job.id)
    return job


def list_jobs(session: Session, caller: Caller, *, query: PageQuery, labels: dict[str, str] | None) -> Page[Job]:
    """A page of the project's jobs that have all of ``labels``; None asks for those without any."""
    jobs = JobRepository(session, caller.project_id)
    if labels is None:
        return jobs.page(query, jobs.has_no_labels())
    return jobs.page(query, *(jobs.has_label(key, value) for key, value in labels.items()))


def get(session: Session, caller: Caller, job_id: str) -> Job:
    """One job; raises ``JobNotFound``."""
    return JobRepository(session, caller.project_id).get(job_id)


def list_events(session: Session, caller: Caller, *, job_id: str, query: PageQuery) -> Page[JobEvent]:
    """A page of a job's events; raises ``JobNotFound``."""
    jobs = JobRepository(session, caller.project_id)
    return jobs.events(jobs.get(job_id), query)


def list_checkpoints(session: Session, caller: Caller, *, job_id: str, query: PageQuery) -> Page[Checkpoint]:
    """A page of a job's checkpoints; raises ``JobNotFound``."""
    jobs = JobRepository(session, caller.project_id)
    return jobs.checkpoints(jobs.get(job_id), query)


def cancel(session: Session, caller: Caller, job_id: str) -> Job:
    """End the job where nothing runs yet, else ask its trainer to stop.

    Raises:
        JobNotFound: there is none in the project.
        JobNotCancellable: it has ended.
    """
    job = JobRepository(session, caller.project_id).get(job_id)
    for _ in range(CANCEL_ROUNDS):
        if _try_cancel(session, job):
            session.refresh(job)
            return job
        session.refresh(job)  # a worker moved it in between
    raise RuntimeError(f"{job_id} changed {CANCEL_ROUNDS} times while it was cancelled; it is {job.status}")


def _try_cancel(session: Session, job: Job) -> bool:
    """One guarded attempt from the status that was read; False if the job has another one by now."""
    status = JobStatus(job.status)
    match status:
        case JobStatus.VALIDATING_FILES | JobStatus.QUEUED:
            moved = move_job(
                session, job.id, source=status, target=JobStatus.CANCELLED, finished_at=now(), progress=None
            )
            if moved:
                add_event(session, job.id, message="Cancelled", level="warn")
            return moved
        case JobStatus.RUNNING:
            if job.cancel_requested:
                return True
            asked = request_cancel(session, job.id)
            if asked:
                add_event(session, job.id, message="Cancellation requested", level="warn")
            return asked
        case JobStatus.SUCCEEDED | JobStatus.FAILED | JobStatus.CANCELLED:
            raise JobNotCancellable(f"The job {job.id} is already {status}; only an unfinished one can be cancelled.")
        case _:
            assert_never(status)


def _refuse_unsupported(body: JobCreate) -> None:
    if body.method is not None and body.method.type != "supervised":
        raise UnsupportedParameter(
            f"Found the method {body.method.type!r}; only 'supervised' is supported.", param="method.type"
        )
    for name in ("dpo", "reinforcement"):
        if body.method is not None and getattr(body.method, name) is not None:
            raise UnsupportedParameter(
                f"method.{name} does not go with the type 'supervised'; leave it out.", param=f"method.{name}"
            )
    if body.integrations:
        raise UnsupportedParameter("Integrations are not supported yet; leave them out.", param="integrations")


def _check_file(file: File, *, param: str) -> None:
    if file.purpose != Purpose.FINE_TUNE:
        raise InvalidRequest(
            f"The file {file.id} has the purpose {file.purpose!r}; upload it with purpose 'fine-tune'.",
            param=param,
            code="invalid_file_purpose",
        )
    if file.bytes == 0:
        raise InvalidRequest(
            f"The file {file.id} is empty; expected JSON lines with one example each.",
            param=param,
            code="empty_file",
        )


def _new_job(caller: Caller, body: JobCreate) -> Job:
    return Job(
        id=new_id("ftjob-"),
        project_id=caller.project_id,
        status=JobStatus.VALIDATING_FILES,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
        labels=body.metadata,
        hyperparameters=_hyperparameters(body).model_dump(mode="json"),
        adapter=body.peft.adapter().model_dump(mode="json"),
        learning_rate=body.peft.learning_rate,
        created_at=now(),
    )


def _hyperparameters(body: JobCreate) -> HyperparameterRequest:
    supervised = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    deprecated = body.hyperparameters
    if supervised is not None and deprecated is not None and supervised != deprecated:
        raise InvalidRequest(
            "Found other values in 'hyperparameters' than in 'method.supervised.hyperparameters'; "
            "give the latter only.",
            param="hyperparameters",
        )
    return supervised or deprecated or HyperparameterRequest()
