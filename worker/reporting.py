"""Makes the reports that clients ask for; a job's own validation makes them by the same code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from api.files.models import FileStatus
from api.files.repository import FileRepository
from api.reports.models import FileReport, ReportStatus
from api.reports.repository import claim, find_rows, finish, set_file_status
from api.reports.schemas import ReportRequest
from api.reports.service import status_of
from uora.data import MAX_PREVIEWS, DatasetReport, check_rows
from uora.spec import parse_adapter
from worker import failures
from worker.context import Resources
from worker.failures import Failure, FailureKind
from worker.models import find_base, load_libraries

logger = logging.getLogger(__name__)

#: For so long, one worker makes a report and no other begins it.
LEASE_TTL = timedelta(minutes=15)
#: Workers that may vanish over one file.
MAX_ATTEMPTS = 3
_GIVEN_UP = Failure(
    kind=FailureKind.PLATFORM,
    code="report_failed",
    message="Several workers in a row vanished while they read this file; the service's log may say why.",
)
#: The request that decides a file's status.
_CHECK = ReportRequest()


def make_report(held: Resources, report_id: str) -> None:
    """Make a report, unless somebody else does, or it is there."""
    with held.sessions.begin() as session:
        claimed = claim(session, report_id, ttl=LEASE_TTL)
    if claimed is None:
        return
    if claimed.attempt > MAX_ATTEMPTS:
        _fail(held, claimed, _GIVEN_UP)
        return
    try:
        report, footprint = _make(held, claimed)
    except SQLAlchemyError:
        raise  # the database's trouble: the sweeper rings again
    except Exception as error:
        logger.exception("report %s on %s", claimed.id, claimed.file_id)
        _fail(held, claimed, failures.describe(error))
    else:
        _complete(held, claimed, report, footprint)


def _make(held: Resources, claimed: FileReport) -> tuple[DatasetReport, dict[str, Any] | None]:
    request = ReportRequest.model_validate(claimed.request)
    with held.sessions() as session:
        found = find_rows(session, claimed)
    report = found or _read(held, claimed, request)
    if request.adapter is None or request.base_model is None or request.task is None:
        return report, None
    load_libraries()
    from uora.sizing import footprint

    base = find_base(held.settings, request.base_model)
    return report, asdict(footprint(base, parse_adapter(request.adapter), request.task))


def _read(held: Resources, claimed: FileReport, request: ReportRequest) -> DatasetReport:
    with ExitStack() as opened:
        path = opened.enter_context(_local_path(held, claimed, claimed.file_id))
        if request.base_model is None:
            return check_rows(path, request.task)
        load_libraries()
        from uora.encoders import report_file

        training = request.training_file
        return report_file(
            path,
            find_base(held.settings, request.base_model),
            task=request.task,
            max_length=request.max_length,
            overlong=request.overlong,
            training=opened.enter_context(_local_path(held, claimed, training)) if training else None,
            n_previews=MAX_PREVIEWS,
        )


@contextmanager
def _local_path(held: Resources, claimed: FileReport, file_id: str) -> Iterator[Path]:
    with held.sessions() as session:
        key = FileRepository(session, claimed.project_id).get_kept(file_id).storage_key
    with held.storage.local_path(key) as path:
        yield path


def _complete(held: Resources, claimed: FileReport, report: DatasetReport, footprint: dict[str, Any] | None) -> None:
    values = {"report": report.model_dump(mode="json"), "footprint": footprint}
    with held.sessions.begin() as session:
        done = finish(session, claimed, status=ReportStatus.COMPLETED, **values)
        if done and claimed.key == _CHECK.key:
            status, details = status_of(report)
            set_file_status(session, claimed.file_id, status=status, details=details)


def _fail(held: Resources, claimed: FileReport, failure: Failure) -> None:
    error = failure.model_dump(mode="json", exclude={"kind"})
    with held.sessions.begin() as session:
        failed = finish(session, claimed, status=ReportStatus.FAILED, error=error)
        if failed and claimed.key == _CHECK.key:  # a client that waits must not wait for ever
            set_file_status(session, claimed.file_id, status=FileStatus.ERROR, details=failure.message)
