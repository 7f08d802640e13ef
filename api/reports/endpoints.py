"""``/v1/files/{file_id}/report``"""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response

from api.auth import CallerDep
from api.dependencies import ResourcesDep, WorkDep
from api.reports import service
from api.reports.models import ReportStatus
from api.reports.schemas import FileReportObject
from api.routing import Router
from uora.data.fitting import Overlong
from uora.spec import Task

router = Router(prefix="/files", tags=["files"])

#: Seconds after which a report that is being made is worth another look.
RETRY_AFTER = "1"


@router.get("/{file_id}/report", responses={202: {"model": FileReportObject, "description": "It is being made."}})
def get_report(
    file_id: str,
    caller: CallerDep,
    work: WorkDep,
    resources: ResourcesDep,
    response: Response,
    model: str | None = None,
    task: Task | None = None,
    max_length: Annotated[int | None, Query(ge=8)] = None,
    overlong: Overlong = "error",
    training_file: str | None = None,
) -> FileReportObject:
    """What a training file is and what is wrong with it; with a model, also its tokens and first rows."""
    asked = service.Question(model, task, max_length, overlong, training_file)
    found = service.ask_about(work, caller, file_id=file_id, asked=asked, base_models=resources.settings.base_models)
    if found.status == ReportStatus.QUEUED:
        response.status_code, response.headers["Retry-After"] = 202, RETRY_AFTER
    return FileReportObject.of(found)
