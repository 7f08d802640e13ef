"""Checks a new job's files with the base model's own tokenizer, and queues it or fails it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import exists, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api import tracing
from api.database import now
from api.errors import FileNotFound
from api.files.repository import FileRepository
from api.jobs.models import Job, JobEvent, JobStatus
from api.jobs.repository import add_event, move_job
from api.queue import TaskName
from api.unit_of_work import UnitOfWork, open_unit_of_work
from api.webhooks import service as webhooks
from uora.data import DatasetReport
from uora.errors import DataError
from uora.spec import (
    HyperparameterRequest,
    Task,
    TrainingOptions,
    TrainingSpec,
    cotraining_key,
    parse_adapter,
    resolve,
)
from worker import failures
from worker.context import Resources
from worker.failures import Failure, FailureKind
from worker.models import find_base, load_libraries
from worker.results import add_failure_event, stored_error

if TYPE_CHECKING:
    from uora.models import LocalModel

logger = logging.getLogger(__name__)

#: On ``training`` and, where there is one, on ``validation``.
Reports = dict[str, DatasetReport]


@dataclass(frozen=True)
class Checked:
    """Good files: what is run on them, and what was found in them."""

    spec: TrainingSpec
    reports: Reports


@dataclass(frozen=True)
class Files:
    """A job's files on this machine, and the base model that takes their rows."""

    base: LocalModel
    training: Path
    validation: Path | None


class Refused(Exception):
    """The job cannot be trained, and the user is told why, with all that was found in the files."""

    def __init__(self, failure: Failure, reports: Reports | None = None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.reports = reports


def validate(held: Resources, job_id: str) -> None:
    """Move a job on from ``validating_files``. A job that has moved on already is left alone."""
    job = _begin(held, job_id)
    if job is not None:
        with tracing.span("files.validate", parent=job.traceparent, uora_job__id=job.id):
            _validate(held, job)


def _validate(held: Resources, job: Job) -> None:
    try:
        checked = _check(held, job)
    except Refused as refused:
        _fail(held, job, refused.failure, refused.reports)
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
    load_libraries()
    from uora.sizing import with_estimate

    base = find_base(held.settings, job.base_model)
    reports = _describe(held, job, base)
    _refuse_problems(reports)
    spec = resolve(
        HyperparameterRequest.model_validate(job.hyperparameters),
        adapter=parse_adapter(job.adapter),
        learning_rate=job.learning_rate,
        seed=job.seed,
        n_examples=reports["training"].rows_usable,
        task=_task(job),
        options=_options(job),
    )
    return Checked(
        spec, reports | {"training": with_estimate(reports["training"], spec, base, prices=held.settings.prices)}
    )


def _describe(held: Resources, job: Job, base: LocalModel) -> Reports:
    with ExitStack() as opened:
        training = opened.enter_context(_local_path(held, job, job.training_file, param="training_file"))
        validation = None
        if job.validation_file:
            validation = opened.enter_context(_local_path(held, job, job.validation_file, param="validation_file"))
        return describe_datasets(job, Files(base, training, validation))


def describe_datasets(job: Job, files: Files) -> Reports:
    """What is in a job's files, as its base model takes them; problems of their content are in the reports.

    Raises:
        BaseModelError: the base model has no tokenizer or image processor for the task.
    """
    from uora.encoders import report_file  # loads torch, which takes seconds

    options = _options(job)

    def report(path: Path, *, training: Path | None = None) -> DatasetReport:
        return report_file(
            path,
            files.base,
            task=_task(job),
            max_length=options.max_length,
            overlong=options.overlong,
            training=training,
        )

    reports: Reports = {"training": report(files.training)}
    if files.validation is not None:
        reports["validation"] = report(files.validation, training=files.training)
    return reports


def _refuse_problems(reports: Reports) -> None:
    for name, report in reports.items():
        if report.problems:
            first = report.problems[0]
            error = DataError(first.message, location=first.location, code=first.code)
            raise Refused(failures.describe(error, param=f"{name}_file"), reports)


def _task(job: Job) -> Task:
    return cast(Task, job.task)  # checked by the api


def _options(job: Job) -> TrainingOptions:
    return TrainingOptions.model_validate(job.options)


@contextmanager
def _local_path(held: Resources, job: Job, file_id: str, *, param: str) -> Iterator[Path]:
    try:
        with held.sessions() as session:
            key = FileRepository(session, job.project_id).get_kept(file_id).storage_key
        opened = ExitStack()
        path = opened.enter_context(held.storage.local_path(key))
    except (FileNotFound, FileNotFoundError) as error:
        logger.warning("job %s: %s", job.id, error)
        message = f"The file {file_id} is not there any more. Upload it again and create a new job."
        missing = Failure(kind=FailureKind.USER, code="file_not_found", message=message, param=param)
        raise Refused(missing) from error
    with opened:
        yield path


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
            cotraining_key=_cotraining_key(job.base_model, checked),
            dataset_report=_stored(checked.reports),
        )
        if moved:
            _announce_queued(work, job, checked, paused=bool(pause))


def _cotraining_key(base_model: str, checked: Checked) -> str | None:
    """``job.cotraining_key``: `uora.spec.cotraining_key` among the jobs of all base models.

    None also for rows so long that a run by itself keeps no activations: passes that runs share keep them.
    """
    from uora.training.trainer import MAX_KEPT_ROW_TOKENS  # loads torch, which takes seconds

    key = cotraining_key(checked.spec)
    longest = max(report.lengths.max if report.lengths else 0 for report in checked.reports.values())
    if key is None or (checked.spec.options.gradient_checkpointing == "auto" and longest > MAX_KEPT_ROW_TOKENS):
        return None
    return hashlib.sha256(f"{base_model}\n{key}".encode()).hexdigest()


def _announce_queued(work: UnitOfWork, job: Job, checked: Checked, *, paused: bool) -> None:
    for name, report in checked.reports.items():
        add_event(work.session, job.id, message=_counts(name, report))
    if paused:
        add_event(work.session, job.id, message="Files validated; the job is paused")
        return
    add_event(work.session, job.id, message="Files validated, moving job to queued state")
    work.ring(TaskName.TRAIN, job.id)


def _counts(name: str, report: DatasetReport) -> str:
    leak = "" if report.leak is None else f", {report.leak} also in the training file"
    return (
        f"The {name} file has {report.rows_usable} rows of {report.tokens} tokens, {report.learned_tokens} of them "
        f"learned; {report.rows_truncated} rows are cut, {report.rows_dropped} left out, "
        f"{report.duplicates.count} duplicates{leak}"
    )


def _stored(reports: Reports | None) -> dict[str, Any] | None:
    """Reports as ``job.dataset_report`` holds them."""
    if reports is None:
        return None
    return {name: report.model_dump(mode="json") for name, report in reports.items()}


def _fail(held: Resources, job: Job, failure: Failure, reports: Reports | None = None) -> None:
    with open_unit_of_work(held.sessions, held.queue) as work:
        moved = move_job(
            work.session,
            job.id,
            source=JobStatus.VALIDATING_FILES,
            target=JobStatus.FAILED,
            error=stored_error(failure),
            dataset_report=_stored(reports),
            finished_at=now(),
            pause_requested=False,
        )
        if moved:
            add_failure_event(work.session, job.id, failure)
            webhooks.ring(work, job.id)
