"""``/v1/fine_tuning/jobs``"""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

from fastapi import Body, Depends, Header, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from api.auth import CallerDep, current_caller
from api.caller import Caller
from api.completions.responses import unless_disconnected
from api.conditional import IF_NONE_MATCH, NOT_MODIFIED, Condition, make_tag, not_modified, tagged
from api.dependencies import PageParams, ReadSessionDep, ResourcesDep, SessionDep, WorkDep
from api.errors import InvalidRequest
from api.jobs import comparing, polling, service
from api.jobs.comparing import JobComparison
from api.jobs.following import MEDIA_TYPE, Follower
from api.jobs.models import Job
from api.jobs.schemas import (
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    JobCreate,
    JobDeleted,
    JobPlan,
    JobStates,
)
from api.models.service import model_name
from api.pagination import ListObject, PageQuery
from api.resources import get_resources
from api.routing import Router

router = Router(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

JobPage = Annotated[PageQuery, Depends(PageParams(default_limit=20))]
CheckpointPage = Annotated[PageQuery, Depends(PageParams(default_limit=10))]

_LABEL = re.compile(r"metadata\[(.*)\]", re.DOTALL)


async def label_filter(request: Request) -> dict[str, str] | None:
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


#: Seconds to wait for a change before the answer.
Wait = Annotated[float, Query(ge=0, le=60)]
Ids = Annotated[str, Query(description="Ids of jobs with commas between them.")]


@router.post("")
def create_job(
    body: JobCreate, caller: CallerDep, work: WorkDep, resources: ResourcesDep, *, dry_run: bool = False
) -> FineTuningJob | JobPlan:
    """Start a fine-tuning job; with ``dry_run``, check the request as for a job, and tell what it would make."""
    if dry_run:
        job = service.plan(work.session, caller, body=body, settings=resources.settings)
        name = model_name(job.base_model, slug=caller.project_slug, suffix=job.suffix, job_id="<job>")
        return JobPlan.of(job, seed=body.seed, name=name)
    return FineTuningJob.of(service.create(work, caller, body=body, settings=resources.settings))


@router.get("", response_model=ListObject[FineTuningJob], responses=NOT_MODIFIED, openapi_extra=IF_NONE_MATCH)
def list_jobs(
    request: Request,
    caller: CallerDep,
    session: ReadSessionDep,
    resources: ResourcesDep,
    query: JobPage,
    labels: LabelFilter,
) -> Response:
    """List the project's jobs, newest first."""
    tag = make_tag(polling.FORMS, service.list_key(session, caller, query=query, labels=labels))
    if Condition.of(request).met_by(tag):
        return not_modified(tag)
    kept_as = f"{caller.project_id} {query} {labels}"
    body = resources.jobs.bodies.get(kept_as, tag)
    if body is None:
        page = service.list_jobs(session, caller, query=query, labels=labels)
        places = service.places(session, caller, page.rows)
        shown = ListObject.of(page, lambda job: FineTuningJob.of(job, place=places.get(job.seq)))
        body = shown.model_dump_json().encode()
        resources.jobs.bodies.put(kept_as, tag, body)
    return tagged(body, tag)


@router.get("/states", response_model=JobStates, responses=NOT_MODIFIED, openapi_extra=IF_NONE_MATCH)
async def get_states(
    request: Request, caller: CallerDep, resources: ResourcesDep, ids: Ids, wait: Wait = 0
) -> Response:
    """The states of many jobs: all that changes while they are worked on."""
    answer = polling.answer_states(resources, caller, ids, condition=Condition.of(request), wait=wait)
    return await (unless_disconnected(request, answer) if wait else answer)


@router.get("/compare")
def compare_jobs(caller: CallerDep, session: ReadSessionDep, ids: Ids) -> JobComparison:
    """Jobs side by side: what of their requests differs, and what came of it."""
    return comparing.compare(session, caller, polling.parse_ids(ids, at_most=comparing.MAX_COMPARED))


@router.get("/{job_id}", response_model=FineTuningJob, responses=NOT_MODIFIED, openapi_extra=IF_NONE_MATCH)
async def get_job(request: Request, job_id: str, caller: CallerDep, wait: Wait = 0) -> Response:
    """Describe one job."""
    # Polled more than all else, so that each further dependency would show.
    resources = await get_resources(request)
    answer = polling.answer_job(resources, caller, job_id, condition=Condition.of(request), wait=wait)
    return await (unless_disconnected(request, answer) if wait else answer)


@router.delete("/{job_id}")
def delete_job(job_id: str, caller: CallerDep, session: SessionDep, *, models: bool = False) -> JobDeleted:
    """Delete a job that has ended, its events, checkpoints and state; its model too if ``models``."""
    service.delete(session, caller, job_id, models=models)
    return JobDeleted(id=job_id)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: CallerDep, work: WorkDep) -> FineTuningJob:
    """Cancel an unfinished job."""
    return FineTuningJob.of(service.cancel(work, caller, job_id))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: CallerDep, session: SessionDep) -> FineTuningJob:
    """Stop a job so that it can go on later."""
    return FineTuningJob.of(service.pause(session, caller, job_id))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: CallerDep, work: WorkDep) -> FineTuningJob:
    """Go on with a paused job, or with a failed one whose state was kept."""
    return _shown(work.session, caller, service.resume(work, caller, job_id))


@router.post("/{job_id}/retry")
def retry_job(job_id: str, caller: CallerDep, work: WorkDep, resources: ResourcesDep) -> FineTuningJob:
    """Make a new job of a failed or cancelled one's request."""
    return FineTuningJob.of(service.retry(work, caller, job_id, settings=resources.settings))


@router.post("/{job_id}/clone")
def clone_job(
    job_id: str,
    caller: CallerDep,
    work: WorkDep,
    resources: ResourcesDep,
    changes: Annotated[dict[str, Any] | None, Body()] = None,
) -> FineTuningJob:
    """Make a new job of another one's request, with the changes of a JSON merge patch."""
    return FineTuningJob.of(service.clone(work, caller, job_id, changes=changes or {}, settings=resources.settings))


@router.get(
    "/{job_id}/events",
    response_model=ListObject[FineTuningJobEvent],
    responses={**NOT_MODIFIED, 200: {"content": {MEDIA_TYPE: {}}}, 204: {"description": "No event will follow."}},
    openapi_extra=IF_NONE_MATCH,
)
async def list_events(
    request: Request,
    job_id: str,
    caller: CallerDep,
    resources: ResourcesDep,
    query: JobPage,
    wait: Wait = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """List what happened to a job, newest first; with ``Accept: text/event-stream``, as it happens, oldest first."""
    if MEDIA_TYPE in request.headers.get("accept", ""):
        check_key = partial(current_caller, request)
        return await Follower(resources, caller, job_id, check_key).answer(after=last_event_id or query.after)
    answer = polling.answer_events(resources, caller, job_id, query=query, condition=Condition.of(request), wait=wait)
    return await (unless_disconnected(request, answer) if wait else answer)


@router.get(
    "/{job_id}/checkpoints",
    response_model=ListObject[FineTuningJobCheckpoint],
    responses=NOT_MODIFIED,
    openapi_extra=IF_NONE_MATCH,
)
def list_checkpoints(
    request: Request, job_id: str, caller: CallerDep, session: ReadSessionDep, query: CheckpointPage
) -> Response:
    """List a job's checkpoints, newest first."""
    tag = make_tag(polling.FORMS, service.checkpoints_key(session, caller, job_id=job_id, query=query))
    if Condition.of(request).met_by(tag):
        return not_modified(tag)
    page = service.list_checkpoints(session, caller, job_id=job_id, query=query)
    return tagged(ListObject.of(page, FineTuningJobCheckpoint.of).model_dump_json().encode(), tag)


@router.post("/{job_id}/checkpoints/{checkpoint_id}/promote")
def promote_checkpoint(
    job_id: str, checkpoint_id: str, caller: CallerDep, session: SessionDep
) -> FineTuningJobCheckpoint:
    """Let the job's model answer as this checkpoint; ``best`` is the one of the lowest validation loss."""
    return FineTuningJobCheckpoint.of(service.promote(session, caller, job_id=job_id, checkpoint_id=checkpoint_id))


def _shown(session: Session, caller: Caller, job: Job) -> FineTuningJob:
    """A job that may wait in the queue."""
    return FineTuningJob.of(job, place=service.places(session, caller, [job]).get(job.seq))
