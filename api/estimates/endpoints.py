"""``/v1/fine_tuning/estimate``"""

from __future__ import annotations

from fastapi import Response

from api.auth import CallerDep
from api.dependencies import ResourcesDep, WorkDep
from api.estimates import service
from api.estimates.schemas import JobEstimate
from api.jobs.schemas import JobCreate
from api.reports.endpoints import RETRY_AFTER
from api.routing import Router

router = Router(prefix="/fine_tuning", tags=["fine-tuning"])


@router.post("/estimate", responses={202: {"model": JobEstimate, "description": "A worker reads the files."}})
def estimate_job(
    body: JobCreate, caller: CallerDep, work: WorkDep, resources: ResourcesDep, response: Response
) -> JobEstimate:
    """What a job of this request would take, without making it."""
    found = service.estimate_job(work, caller, body=body, settings=resources.settings)
    if found.status == "in_progress":
        response.status_code, response.headers["Retry-After"] = 202, RETRY_AFTER
    return found
