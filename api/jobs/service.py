"""What can be done with fine-tuning jobs."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from sqlalchemy.orm import Session

from api import tracing
from api.caller import Caller
from api.database import new_id, now
from api.errors import (
    InvalidRequest,
    JobNotDeletable,
    JobNotRetryable,
    ModelNotFound,
    NotPromotable,
    UnsupportedParameter,
)
from api.files.models import File
from api.files.repository import FileRepository
from api.files.schemas import Purpose
from api.jobs import moving
from api.jobs.integrations import check_offered
from api.jobs.models import ENDED, Checkpoint, Job, JobEvent, JobStatus
from api.jobs.repository import JobRepository, JobVersion, add_event
from api.jobs.requests import changed_request
from api.jobs.schemas import MAX_SEED, JobCreate
from api.models.models import Adapter
from api.models.repository import AdapterRepository
from api.pagination import Page, PageQuery
from api.queue import TaskName
from api.quotas import service as quotas
from api.settings import Settings
from api.unit_of_work import UnitOfWork
from api.webhooks import service as webhooks
from uora.spec import HyperparameterRequest, parse_adapter

log = structlog.get_logger(__name__)

#: Settings of an adapter that only say how it is trained: a job that starts from a fine-tuned model may have others.
FREE_SETTINGS = frozenset({"dropout", "tau"})
#: Instead of a checkpoint's id: the one of the lowest validation loss.
BEST = "best"


@dataclass(frozen=True)
class Start:
    """What a new job starts from: a base model as it is, or with the adapter of a fine-tuned model."""

    base_model: str
    #: ``uora.spec.AdapterSpec``.
    adapter: dict[str, Any]
    task: str
    tuned: Adapter | None = None


def create(
    work: UnitOfWork,
    caller: Caller,
    *,
    body: JobCreate,
    settings: Settings,
    sweep_id: str | None = None,
    origin: Job | None = None,
) -> Job:
    """Insert the job, for a sweep or as one that was made of another if these are named, and ring for its validation.

    Raises:
        JobQuotaExceeded: the project may not have more jobs in the queue.
        ApiError: as `plan`.
    """
    job = plan(work.session, caller, body=body, settings=settings)
    quotas.check_jobs(work.session, caller)
    job.sweep_id = sweep_id
    job.origin_job = origin.id if origin else None
    JobRepository(work.session, caller.project_id).add(job)
    add_event(work.session, job.id, message=f"Created fine-tuning job: {job.id}")
    work.ring(TaskName.VALIDATE, job.id)
    # Which request made which job: a worker knows the job's id alone.
    work.on_commit(partial(log.info, "job_created", job_id=job.id, project_id=job.project_id))
    return job


def plan(session: Session, caller: Caller, *, body: JobCreate, settings: Settings) -> Job:
    """The job that a request makes, which is not in the session; its files are locked against deletion.

    Raises:
        ModelNotFound: neither a base model nor one of the project's.
        FileNotFound: a file that is not in the project.
        InvalidRequest: a file that cannot be used, settings that do not go together, or what is not offered.
    """
    _refuse_unsupported(body)
    check_offered(body.integrations, settings)
    _check_validation_needs(body)
    start = _find_start(session, caller, body=body, base_models=settings.base_models)
    files = FileRepository(session, caller.project_id)
    for param, file_id in (("training_file", body.training_file), ("validation_file", body.validation_file)):
        if file_id is not None:
            _check_file(files.lock(file_id, shared=True, param=param), param=param)
    return _new_job(caller, body, start)


def retry(work: UnitOfWork, caller: Caller, job_id: str, *, settings: Settings) -> Job:
    """Make the job of a failed or cancelled one's request again, seed included; what became of the first one stays.

    Raises:
        JobNotFound: there is none in the project.
        JobNotRetryable: it has not ended so.
        ApiError: as `plan`.
    """
    job = get(work.session, caller, job_id)
    if job.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise JobNotRetryable(
            f"The job {job.id} is {job.status}; only a failed or cancelled one can be retried. POST .../clone makes "
            "a job of the same request at any time."
        )
    return create(work, caller, body=changed_request(job, {}), settings=settings, origin=job)


def clone(work: UnitOfWork, caller: Caller, job_id: str, *, changes: Mapping[str, Any], settings: Settings) -> Job:
    """Make a job of another one's request with ``changes``, a JSON merge patch.

    Raises:
        JobNotFound: there is none in the project.
        RequestValidationError: with the changes it is no request of a job.
        ApiError: as `plan`.
    """
    job = get(work.session, caller, job_id)
    return create(work, caller, body=changed_request(job, changes), settings=settings, origin=job)


def delete(session: Session, caller: Caller, job_id: str, *, models: bool) -> None:
    """Delete a job that has ended, with its events, its state, and its checkpoints under whose names no model answers
    any more. Its model stays, unless ``models``; so do its files.

    Raises:
        JobNotFound: there is none in the project.
        JobNotDeletable: it has not ended.
    """
    jobs = JobRepository(session, caller.project_id)
    job = jobs.lock(job_id)
    if job.status not in ENDED:
        raise JobNotDeletable(f"The job {job.id} is {job.status}; cancel it first, or wait for its end.")
    adapters = AdapterRepository(session, caller.project_id)
    of_job = adapters.list_of_job(job.id)
    adapters.delete([adapter for adapter in of_job if models or adapter.checkpoint_step is not None])
    session.flush()
    jobs.delete(job)


def list_jobs(session: Session, caller: Caller, *, query: PageQuery, labels: dict[str, str] | None) -> Page[Job]:
    """A page of the project's jobs that have all of ``labels``; None asks for those without any."""
    jobs = JobRepository(session, caller.project_id)
    return jobs.page(query, *jobs.has_labels(labels))


def list_key(session: Session, caller: Caller, *, query: PageQuery, labels: dict[str, str] | None) -> object:
    """What changes whenever something is to be seen on the page that `list_jobs` gives."""
    jobs = JobRepository(session, caller.project_id)
    return jobs.list_key(query, *jobs.has_labels(labels))


def get(session: Session, caller: Caller, job_id: str) -> Job:
    """One job; raises ``JobNotFound``."""
    return JobRepository(session, caller.project_id).get(job_id)


def get_with_version(session: Session, caller: Caller, job_id: str) -> tuple[Job, JobVersion]:
    """One job, and what tells its watchers whether it changed; raises ``JobNotFound``."""
    jobs = JobRepository(session, caller.project_id)
    job = jobs.get(job_id)
    return job, JobVersion(
        job.project_id, job.id, job.seq, job.status, job.version, job.event_count, jobs.places([job]).get(job.seq)
    )


def find_states(session: Session, caller: Caller, job_ids: Collection[str]) -> dict[str, Job]:
    """Those of the jobs that there are, by id, without what does not change while they are worked on."""
    return JobRepository(session, caller.project_id).find_states(job_ids)


def places(session: Session, caller: Caller, jobs: Iterable[Job]) -> dict[int, int]:
    """Places in the queue of those jobs that wait in it, by ``seq``."""
    return JobRepository(session, caller.project_id).places(jobs)


def list_events(session: Session, caller: Caller, *, job_id: str, query: PageQuery) -> Page[JobEvent]:
    """A page of a job's events; none of a job that is not there."""
    return JobRepository(session, caller.project_id).events(job_id, query)


def list_checkpoints(session: Session, caller: Caller, *, job_id: str, query: PageQuery) -> Page[Checkpoint]:
    """A page of a job's checkpoints; raises ``JobNotFound``."""
    jobs = JobRepository(session, caller.project_id)
    return jobs.checkpoints(jobs.get(job_id), query)


def checkpoints_key(session: Session, caller: Caller, *, job_id: str, query: PageQuery) -> object:
    """What changes whenever something is to be seen on the page that `list_checkpoints` gives."""
    jobs = JobRepository(session, caller.project_id)
    return jobs.checkpoints_key(jobs.get(job_id), query)


def cancel(work: UnitOfWork, caller: Caller, job_id: str) -> Job:
    """End the job where nothing runs yet, else ask its trainer to stop.

    Raises:
        JobNotFound: there is none in the project.
        JobNotCancellable: it has ended.
    """
    session = work.session
    job = JobRepository(session, caller.project_id).get(job_id)
    job = moving.until_done(session, job, lambda: moving.try_cancel(session, job))
    webhooks.ring(work, job.id)
    return job


def pause(session: Session, caller: Caller, job_id: str) -> Job:
    """Pause the job where nothing runs yet, else ask whoever works on it to stop. Twice is as good as once.

    Raises:
        JobNotFound: there is none in the project.
        JobNotPausable: it has ended, or is being cancelled.
    """
    job = JobRepository(session, caller.project_id).get(job_id)
    return moving.until_done(session, job, lambda: moving.try_pause(session, job))


def resume(work: UnitOfWork, caller: Caller, job_id: str) -> Job:
    """Queue a paused job again, or a failed one whose state was kept; take back a pause that has not happened yet.

    Raises:
        JobNotFound: there is none in the project.
        JobNotResumable: it is not paused, and has not failed with a state to go on from.
        FileNotFound: a file that it needs was deleted since it failed.
        JobQuotaExceeded: the project may not have more jobs in the queue.
    """
    job = JobRepository(work.session, caller.project_id).get(job_id)
    return moving.until_done(work.session, job, lambda: moving.try_resume(work, caller, job))


def promote(session: Session, caller: Caller, *, job_id: str, checkpoint_id: str) -> Checkpoint:
    """Let the job's model answer as the checkpoint, or as the ``best``; twice is as good as once.

    The adapter that answered before is still there under the name of its own checkpoint.

    Raises:
        JobNotFound: there is none in the project.
        CheckpointNotFound: the job has no such checkpoint.
        NotPromotable: the job has no model, or none of its checkpoints has a validation loss.
    """
    jobs = JobRepository(session, caller.project_id)
    job = jobs.lock(job_id)  # before its adapter, as whoever deletes the job
    checkpoint = jobs.best_checkpoint(job) if checkpoint_id == BEST else jobs.checkpoint(job, checkpoint_id)
    if checkpoint is None:
        raise NotPromotable(
            f"No checkpoint of the job {job.id} has a validation loss, so none is the best; name one by its id, or "
            "give the next job a validation_file."
        )
    adapters = AdapterRepository(session, caller.project_id)
    final = adapters.lock(job.fine_tuned_model) if job.fine_tuned_model else None
    if final is None:
        raise NotPromotable(
            f"The job {job.id} is {job.status} and has no model; only a model that is there can answer as a "
            f"checkpoint. {checkpoint.model_name} can be asked by its own name."
        )
    if adapters.replace(final, adapters.get(checkpoint.model_name)):
        add_event(session, job.id, message=f"{final.id} answers as {checkpoint.model_name} from now on")
    return checkpoint


def _find_start(session: Session, caller: Caller, *, body: JobCreate, base_models: Collection[str]) -> Start:
    if body.model in base_models:
        return Start(base_model=body.model, adapter=body.peft.adapter().model_dump(mode="json"), task=body.task)
    tuned = AdapterRepository(session, caller.project_id).find(body.model)
    if tuned is None or tuned.base_model not in base_models:
        raise ModelNotFound(
            f"The model {body.model!r} cannot be fine-tuned; expected one of {sorted(base_models)}, or a fine-tuned "
            "model of yours on one of them.",
            param="model",
        )
    adapter = parse_adapter(tuned.manifest["adapter"]).model_dump(mode="json")
    has = {f"peft.{name}": value for name, value in adapter.items()} | {"task": tuned.manifest.get("task", "chat")}
    sent = {f"peft.{name}": value for name, value in body.adapter_as_sent.items()}
    for name in FREE_SETTINGS & body.adapter_as_sent.keys() & adapter.keys():
        adapter[name] = sent.pop(f"peft.{name}")
    if "task" in body.model_fields_set:
        sent["task"] = body.task
    for param, value in sent.items():
        if has.get(param) != value:
            raise InvalidRequest(
                f"Found {param} {value!r}, but {body.model} has {has.get(param)!r}, which training it further cannot "
                f"change; leave {param} out, or start from the base model {tuned.base_model}.",
                param=param,
            )
    return Start(base_model=tuned.base_model, adapter=adapter, task=has["task"], tuned=tuned)


def _check_validation_needs(body: JobCreate) -> None:
    if body.training.needs_validation and body.validation_file is None:
        raise InvalidRequest(
            "training.early_stopping_patience and training.load_best_model_at_end compare validation losses; give a "
            "validation_file, or leave them out.",
            param="validation_file",
            code="missing_required_parameter",
        )


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


def _new_job(caller: Caller, body: JobCreate, start: Start) -> Job:
    return Job(
        id=new_id("ftjob-"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        status=JobStatus.VALIDATING_FILES,
        model=body.model,
        base_model=start.base_model,
        warm_start=start.tuned and start.tuned.id,
        warm_start_digest=start.tuned and start.tuned.digest,
        task=start.task,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
        labels=body.metadata,
        integrations=[each.model_dump(mode="json") for each in body.integrations or ()] or None,
        hyperparameters=_hyperparameters(body).model_dump(mode="json"),
        adapter=start.adapter,
        learning_rate=body.peft.learning_rate,
        options=body.training.model_dump(mode="json"),
        traceparent=tracing.traceparent(),
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
