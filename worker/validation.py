"""Checks a new job's files with the base model's own tokenizer, and queues it or fails it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import exists, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.database import now
from api.errors import FileNotFound
from api.files.repository import FileRepository
from api.jobs.models import Job, JobEvent, JobStatus
from api.jobs.repository import add_event, move_job
from api.queue import TaskName
from api.unit_of_work import UnitOfWork, open_unit_of_work
from uora.data import Dataset, Row, read_file
from uora.errors import BaseModelError, UoraError
from uora.spec import HyperparameterRequest, Task, TrainingOptions, TrainingSpec, parse_adapter, resolve
from worker import failures
from worker.context import Resources
from worker.failures import Failure, FailureKind
from worker.results import add_failure_event, stored_error

logger = logging.getLogger(__name__)

Datasets = dict[str, Dataset[Row]]


@dataclass(frozen=True)
class Checked:
    """Good files: what is run on them, and what was found in them."""

    spec: TrainingSpec
    report: dict[str, Any] | None


class Refused(Exception):
    """The job cannot be trained, and the user is told why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def validate(held: Resources, job_id: str) -> None:
    """Move a job on from ``validating_files``. A job that has moved on already is left alone."""
    job = _begin(held, job_id)
    if job is None:
        return
    try:
        checked = _check(held, job)
    except Refused as refused:
        _fail(held, job, refused.failure)
    except SQLAlchemyError:
        raise  # the database's trouble, not the job's: the sweeper rings again
    except Exception as error:
        logger.exception("job %s: validation failed", job.id)
        _fail(held, job, failures.describe(error))
    else:
        _queue(held, job, checked)


def _begin(held: Resources, job_id: str) -> Job | None:
    with open_unit_of_work(held.sessions, held.queue) as work:
        statement = select(Job).where(Job.id == job_id, Job.status == JobStatus.VALIDATING_FILES)
        job = work.session.scalar(statement)
        if job is not None:
            _announce(work.session, job)
        return job


def _announce(session: Session, job: Job) -> None:
    message = f"Validating training file: {job.training_file}"
    if job.validation_file:
        message += f" and validation file: {job.validation_file}"
    # Said once, however often the message of the queue is repeated.
    said = exists().where(JobEvent.job_id == job.id, JobEvent.message == message)
    if not session.scalar(select(said)):
        add_event(session, job.id, message=message)


def _check(held: Resources, job: Job) -> Checked:
    datasets: Datasets = {"training_file": _read(held, job, job.training_file, param="training_file")}
    if job.validation_file:
        datasets["validation_file"] = _read(held, job, job.validation_file, param="validation_file")
    _check_examples(held, job, datasets)
    spec = resolve(
        HyperparameterRequest.model_validate(job.hyperparameters),
        adapter=parse_adapter(job.adapter),
        learning_rate=job.learning_rate,
        seed=job.seed,
        n_examples=len(datasets["training_file"].rows),
        task=_task(job),
        options=_options(job),
    )
    return Checked(spec=spec, report=describe_datasets(job, datasets))


def describe_datasets(job: Job, datasets: Datasets) -> dict[str, Any] | None:  # noqa: ARG001 - for what comes here
    """What the user is told about the files, as JSON: the place where ``job.dataset_report`` comes from.

    None stores nothing and says nothing.
    """
    return None


def _task(job: Job) -> Task:
    return cast(Task, job.task)  # checked by the api


def _options(job: Job) -> TrainingOptions:
    return TrainingOptions.model_validate(job.options)


def _read(held: Resources, job: Job, file_id: str, *, param: str) -> Dataset[Row]:
    try:
        with held.sessions() as session:
            key = FileRepository(session, job.project_id).get(file_id).storage_key
        with _refusing(param), held.storage.local_path(key) as path:
            return read_file(path, _task(job))
    except (FileNotFound, FileNotFoundError) as error:
        logger.warning("job %s: %s", job.id, error)
        message = f"The file {file_id} is not there any more. Upload it again and create a new job."
        missing = Failure(kind=FailureKind.USER, code="file_not_found", message=message, param=param)
        raise Refused(missing) from error


def _check_examples(held: Resources, job: Job, datasets: Datasets) -> None:
    """Make sure that every row fits the base model, with its own tokenizer and template."""
    # Loads torch, which takes seconds: not before the files are known to be well-formed.
    from uora.models import fetch
    from uora.training.tasks import training_task

    source = held.settings.base_models.get(job.base_model)
    if source is None:
        raise BaseModelError(f"{job.base_model!r} is not among the base models of this process's settings.")
    base = fetch(job.base_model, source, cache_dir=held.settings.cache_dir)
    task = training_task(_task(job), base, datasets["training_file"], options=_options(job))
    for param, dataset in datasets.items():
        with _refusing(param):
            task.examples(dataset)


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Name the file in errors of its content."""
    try:
        yield
    except UoraError as error:
        raise Refused(failures.describe(error, param=param)) from error


def _queue(held: Resources, job: Job, checked: Checked) -> None:
    with open_unit_of_work(held.sessions, held.queue) as work:
        # Locked: a pause that is asked for now must not fall between the look and the move.
        statement = select(Job.pause_requested).where(Job.id == job.id).with_for_update()
        pause = work.session.scalar(statement)
        moved = move_job(
            work.session,
            job.id,
            source=JobStatus.VALIDATING_FILES,
            target=JobStatus.PAUSED if pause else JobStatus.QUEUED,
            pause_requested=False,
            training_spec=checked.spec.model_dump(mode="json"),
            dataset_report=checked.report,
        )
        if moved:
            _announce_queued(work, job, checked, paused=bool(pause))


def _announce_queued(work: UnitOfWork, job: Job, checked: Checked, *, paused: bool) -> None:
    if checked.report is not None:
        add_event(work.session, job.id, message="Files were read", data=checked.report)
    if paused:
        add_event(work.session, job.id, message="Files validated; the job is paused")
        return
    add_event(work.session, job.id, message="Files validated, moving job to queued state")
    work.ring(TaskName.TRAIN, job.id)


def _fail(held: Resources, job: Job, failure: Failure) -> None:
    with open_unit_of_work(held.sessions, held.queue) as work:
        moved = move_job(
            work.session,
            job.id,
            source=JobStatus.VALIDATING_FILES,
            target=JobStatus.FAILED,
            error=stored_error(failure),
            finished_at=now(),
            pause_requested=False,
        )
        if moved:
            add_failure_event(work.session, job.id, failure)
