"""``/v1/fine_tuning/jobs``"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Request

from api.auth import CallerDep
from api.dependencies import PageParams, ReadSessionDep, ResourcesDep, SessionDep, WorkDep
from api.errors import InvalidRequest
from api.jobs import service
from api.jobs.schemas import FineTuningJob, FineTuningJobCheckpoint, FineTuningJobEvent, JobCreate
from api.pagination import ListObject, PageQuery
from api.routing import Router

router = Router(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

JobPage = Annotated[PageQuery, Depends(PageParams(default_limit=20))]
CheckpointPage = Annotated[PageQuery, Depends(PageParams(default_limit=10))]

_LABEL = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def label_filter(request: Request) -> dict[str, str] | None:
    """``metadata[k]=v`` of the query string; None for ``metadata=null``.

    Raises:
        InvalidRequest: ``metadata`` has another form, or both forms are mixed.
    """
    pairs = request.query_params.multi_items()
    labels = {found[1]: value for name, value in pairs if (found := _LABEL.fullmatch(name))}
    plain = request.query_params.get("metadata")
    if plain is None:
        return labels
    if plain != "null" or labels:
        raise InvalidRequest("Found metadata=...; expected metadata[key]=value, or metadata=null.", param="metadata")
    return None


LabelFilter = Annotated[dict[str, str] | None, Depends(label_filter)]


@router.post("")
def create_job(body: JobCreate, caller: CallerDep, work: WorkDep, resources: ResourcesDep) -> FineTuningJob:
    """Start a fine-tuning job."""
    job = service.create(work, caller, body=body, base_models=resources.settings.base_models)
    return FineTuningJob.of(job)


@router.get("")
def list_jobs(
    caller: CallerDep, session: ReadSessionDep, query: JobPage, labels: LabelFilter
) -> ListObject[FineTuningJob]:
    """List the project's jobs, newest first."""
    return ListObject.of(service.list_jobs(session, caller, query=query, labels=labels), FineTuningJob.of)


@router.get("/{job_id}")
def get_job(job_id: str, caller: CallerDep, session: ReadSessionDep) -> FineTuningJob:
    """Describe one job."""
    return FineTuningJob.of(service.get(session, caller, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: CallerDep, session: SessionDep) -> FineTuningJob:
    """Cancel an unfinished job."""
    return FineTuningJob.of(service.cancel(session, caller, job_id))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: CallerDep, session: SessionDep) -> FineTuningJob:
    """Stop a job so that it can go on later."""
    return FineTuningJob.of(service.pause(session, caller, job_id))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: CallerDep, work: WorkDep) -> FineTuningJob:
    """Go on with a paused job, or with a failed one whose state was kept."""
    return FineTuningJob.of(service.resume(work, caller, job_id))


@router.get("/{job_id}/events")
def list_events(
    job_id: str, caller: CallerDep, session: ReadSessionDep, query: JobPage
) -> ListObject[FineTuningJobEvent]:
    """List what happened to a job, newest first."""
    page = service.list_events(session, caller, job_id=job_id, query=query)
    return ListObject.of(page, FineTuningJobEvent.of)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, caller: CallerDep, session: ReadSessionDep, query: CheckpointPage
) -> ListObject[FineTuningJobCheckpoint]:
    """List a job's checkpoints, newest first."""
    page = service.list_checkpoints(session, caller, job_id=job_id, query=query)
    return ListObject.of(page, FineTuningJobCheckpoint.of)


@router.post("/{job_id}/checkpoints/{checkpoint_id}/promote")
def promote_checkpoint(
    job_id: str, checkpoint_id: str, caller: CallerDep, session: SessionDep
) -> FineTuningJobCheckpoint:
    """Let the job's model answer as this checkpoint; ``best`` is the one of the lowest validation loss."""
    return FineTuningJobCheckpoint.of(service.promote(session, caller, job_id=job_id, checkpoint_id=checkpoint_id))
