"""Asking for reports: each is made once, at once where that is cheap, else by a worker."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import now
from api.errors import InvalidRequest, ModelNotFound
from api.files.models import File, FileStatus
from api.files.repository import FileRepository
from api.files.schemas import Purpose
from api.models.repository import AdapterRepository
from api.queue import TaskName
from api.reports.models import FileReport, ReportStatus
from api.reports.repository import ReportRepository, new_report
from api.reports.schemas import ReportRequest
from api.storage import ObjectStore
from api.unit_of_work import UnitOfWork
from uora.data import DatasetReport, check_rows
from uora.data.containers import container_of
from uora.data.fitting import Overlong
from uora.errors import DataError
from uora.spec import Task

log = structlog.get_logger(__name__)

#: Containers that are read by Python's own library.
PLAIN: Final = frozenset({"jsonl", "json", "csv"})
#: A report that could not be made is tried again when it is asked for so long after.
TRY_AGAIN_AFTER: Final = timedelta(seconds=30)


def check_at_once(key: str, storage: ObjectStore) -> DatasetReport | None:
    """What can be said about a small training file without a model; None where a worker must look."""
    try:
        with storage.local_path(key) as path:
            return check_rows(path) if _is_plain(path) else None
    except Exception:
        log.exception("check_failed", file=key)  # the upload is good all the same
        return None


def add_check(work: UnitOfWork, file: File, *, found: DatasetReport | None) -> None:
    """Note what was found in a new file without a model, or ring for a worker that looks."""
    check = new_report(file.project_id, file.id, ReportRequest())
    work.session.add(check)
    if found is None:
        file.status = FileStatus.UPLOADED
        work.ring(TaskName.REPORT, check.id)
        return
    check.status, check.finished_at = ReportStatus.COMPLETED, now()
    check.report = found.model_dump(mode="json")
    status, file.status_details = status_of(found)
    file.status = status


def status_of(report: DatasetReport) -> tuple[FileStatus, str | None]:
    """A file's status and its details."""
    if not report.problems:
        return FileStatus.PROCESSED, None
    first = report.problems[0]
    what = first.message if first.location is None else f"{first.location}: {first.message}"
    if report.problem_count == 1:
        return FileStatus.ERROR, what
    return FileStatus.ERROR, f"{report.problem_count} problems, the first: {what}"


@dataclass(frozen=True)
class Question:
    """What a client asks about a file; ``model`` may be a fine-tuned one, which counts tokens as its base does."""

    model: str | None
    task: Task | None
    max_length: int | None
    overlong: Overlong
    training_file: str | None


def ask_about(
    work: UnitOfWork, caller: Caller, *, file_id: str, asked: Question, base_models: Collection[str]
) -> FileReport:
    """The report that answers a client's question, made or being made.

    Raises:
        FileNotFound: one of the files is not in the project.
        ModelNotFound: neither a base model nor one of the project's.
        InvalidRequest: no training file, or a question that only a model can answer.
    """
    files = FileRepository(work.session, caller.project_id)
    _check_purpose(files.lock(file_id, shared=True), param=None)
    if asked.training_file is not None:
        _check_purpose(files.lock(asked.training_file, shared=True, param="training_file"), param="training_file")
    if asked.model is None and (asked.max_length or asked.training_file or asked.overlong != "error"):
        raise InvalidRequest(
            "Found max_length, overlong or training_file without a model; name the model whose tokens are counted.",
            param="model",
            code="missing_required_parameter",
        )
    request = ReportRequest(
        base_model=asked.model and _base_model(work.session, caller, asked.model, base_models),
        task=asked.task,
        max_length=asked.max_length,
        overlong=asked.overlong,
        training_file=asked.training_file,
    )
    return ask(work, caller, file_id=file_id, request=request)


def _check_purpose(file: File, *, param: str | None) -> None:
    if file.purpose != Purpose.FINE_TUNE:
        raise InvalidRequest(
            f"The file {file.id} has the purpose {file.purpose!r}; only files for fine-tuning are looked into.",
            param=param,
            code="invalid_file_purpose",
        )


def _base_model(session: Session, caller: Caller, model: str, base_models: Collection[str]) -> str:
    if model in base_models:
        return model
    tuned = AdapterRepository(session, caller.project_id).find(model)
    if tuned is None or tuned.base_model not in base_models:
        raise ModelNotFound(
            f"No such model: {model!r}; expected one of {sorted(base_models)}, or a fine-tuned model of yours.",
            param="model",
        )
    return tuned.base_model


def ask(work: UnitOfWork, caller: Caller, *, file_id: str, request: ReportRequest) -> FileReport:
    """The report that answers a request, made or being made; the caller has locked the file, shared at least."""
    reports = ReportRepository(work.session, caller.project_id)
    found = reports.find_made(file_id, request) or reports.find_same(file_id, request)
    is_new = False
    if found is None:
        found, is_new = reports.add_queued(file_id, request)
    elif found.status == ReportStatus.FAILED and found.finished_at and now() - found.finished_at > TRY_AGAIN_AFTER:
        found.status, found.error, found.attempt, is_new = ReportStatus.QUEUED, None, 0, True
        found.created_at = now()
    if is_new:
        work.ring(TaskName.REPORT, found.id)
    return found


def _is_plain(path: Path) -> bool:
    try:
        return container_of(path) in PLAIN
    except DataError:
        return True  # of no kind that is read, which is quickly said
