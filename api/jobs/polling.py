"""Answers to those who ask again and again: nothing is read but the job's version, unless it is another one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api.caller import Caller
from api.conditional import Condition, make_tag, not_modified, tagged
from api.errors import InvalidRequest, JobNotFound
from api.jobs import service
from api.jobs.models import ENDED
from api.jobs.repository import JobVersion
from api.jobs.schemas import FineTuningJob, FineTuningJobCheckpoint, FineTuningJobEvent, JobState, JobStates
from api.pagination import ListObject, Order, PageQuery
from api.resources import Resources

T = TypeVar("T")

#: Jobs of one question at most.
MAX_IDS = 500
#: After an upgrade that shows other things of the same rows, nothing is as clients have it.
FORMS = make_tag(
    *(shown.model_json_schema() for shown in (FineTuningJob, FineTuningJobEvent, FineTuningJobCheckpoint, JobStates))
)


def job_tag(job: JobVersion) -> str:
    """Tag of all that is shown of a job."""
    return make_tag("job", FORMS, job.version, job.place)


def events_tag(job: JobVersion) -> str:
    """Tag of any page of a job's events, of which none changes once it is there."""
    return make_tag("events", FORMS, job.event_count)


async def answer_job(
    resources: Resources, caller: Caller, job_id: str, *, condition: Condition, wait: float = 0.0
) -> Response:
    """One job, at once or once it has changed; raises ``JobNotFound``."""
    look = partial(look_at, resources, caller, job_id)
    found = await look()
    if wait and (condition.if_none_match is not None or found.status not in ENDED):
        found = await _change(resources, look, job_tag, since=found, condition=condition, wait=wait)
    tag = job_tag(found)
    if condition.met_by(tag):
        return not_modified(tag)
    body = resources.jobs.bodies.get(job_id, tag)
    if body is not None:
        return tagged(body, tag)
    tag, read = await run_in_threadpool(_read_job, resources, caller, job_id)
    resources.jobs.bodies.put(job_id, tag, read)
    return tagged(read, tag)


async def answer_events(
    resources: Resources, caller: Caller, job_id: str, *, query: PageQuery, condition: Condition, wait: float = 0.0
) -> Response:
    """A page of a job's events, at once, once it has others, or once there are any behind the cursor.

    Raises:
        JobNotFound: there is none in the project.
    """
    look = partial(look_at, resources, caller, job_id)
    # The count before the events: a tag that is older than its page only costs one more answer.
    found = await look()
    if wait and condition.if_none_match is not None:
        found = await _change(resources, look, events_tag, since=found, condition=condition, wait=wait)
    if condition.met_by(tag := events_tag(found)):
        return not_modified(tag)
    kept_as = f"{job_id} {query}"
    if not wait and (body := resources.jobs.bodies.get(kept_as, tag)):
        return tagged(body, tag)
    read = partial(read_events, resources, caller, job_id, query)
    page = await run_in_threadpool(read)
    if wait and not page.data and query.order is Order.ASC:
        found = await _change(resources, look, events_tag, since=found, condition=Condition(None), wait=wait)
        tag, page = events_tag(found), await run_in_threadpool(read)
    body = page.model_dump_json().encode()
    resources.jobs.bodies.put(kept_as, tag, body)
    return tagged(body, tag)


async def answer_states(
    resources: Resources, caller: Caller, ids: str, *, condition: Condition, wait: float = 0.0
) -> Response:
    """The states of several jobs, in the order asked for; those that are not there are left out."""
    job_ids = parse_ids(ids)

    async def look() -> list[JobVersion]:
        return [found for found in await resources.jobs.look(caller.project_id, job_ids) if found]

    def tag_of(jobs: list[JobVersion]) -> str:
        return make_tag("states", FORMS, [(job.id, job.version, job.place) for job in jobs])

    found = await look()
    if wait:
        found = await _change(resources, look, tag_of, since=found, condition=condition, wait=wait)
    if condition.met_by(tag := tag_of(found)):
        return not_modified(tag)
    shown = await run_in_threadpool(_read_states, resources, caller, found)
    return tagged(shown.model_dump_json().encode(), tag)


def parse_ids(ids: str, *, at_most: int = MAX_IDS) -> list[str]:
    """``a,b,c``, each once.

    Raises:
        InvalidRequest: none, or too many.
    """
    job_ids = list(dict.fromkeys(part.strip() for part in ids.split(",") if part.strip()))
    if not 1 <= len(job_ids) <= at_most:
        raise InvalidRequest(
            f"Found {len(job_ids)} ids of jobs; expected 1 to {at_most}, with commas between them.", param="ids"
        )
    return job_ids


async def look_at(resources: Resources, caller: Caller, job_id: str) -> JobVersion:
    """The version of a job; raises ``JobNotFound``."""
    found = await resources.jobs.look_at(caller.project_id, job_id)
    if found is None:
        raise JobNotFound(f"No such fine-tuning job: {job_id!r}.")
    return found


async def _change(
    resources: Resources,
    look: Callable[[], Awaitable[T]],
    tag_of: Callable[[T], str],
    *,
    since: T,
    condition: Condition,
    wait: float,
) -> T:
    """What is there once it is no more what the client has, or else no more what it was; or when the time is over."""
    known = condition if condition.if_none_match is not None else Condition(tag_of(since))
    if not known.met_by(tag_of(since)):
        return since
    return await resources.jobs.wait(look, lambda found: not known.met_by(tag_of(found)), seconds=wait)


def _read_job(resources: Resources, caller: Caller, job_id: str) -> tuple[str, bytes]:
    with resources.read_sessions() as session:
        job, version = service.get_with_version(session, caller, job_id)
        return job_tag(version), FineTuningJob.of(job, place=version.place).model_dump_json().encode()


def read_events(resources: Resources, caller: Caller, job_id: str, query: PageQuery) -> ListObject[FineTuningJobEvent]:
    with resources.read_sessions() as session:
        page = service.list_events(session, caller, job_id=job_id, query=query)
        return ListObject.of(page, FineTuningJobEvent.of)


def _read_states(resources: Resources, caller: Caller, versions: Sequence[JobVersion]) -> JobStates:
    with resources.read_sessions() as session:
        jobs = service.find_states(session, caller, [version.id for version in versions])
        return JobStates(
            data=[JobState.of(jobs[version.id], place=version.place) for version in versions if version.id in jobs]
        )
