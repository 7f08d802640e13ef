"""A job's events as they happen, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api.caller import Caller
from api.completions.responses import EventStream
from api.errors import JobNotFound, NotAuthenticated
from api.jobs import polling
from api.jobs.models import ENDED
from api.jobs.repository import JobVersion
from api.jobs.schemas import FineTuningJobEvent
from api.pagination import ListObject, Order, PageQuery
from api.resources import Resources

#: Proxies close a connection on which nothing happens.
HEARTBEAT_SECONDS = 15.0
MEDIA_TYPE = "text/event-stream"
PAGE_EVENTS = 200


@dataclass(frozen=True)
class Follower:
    """One stream of one job's events."""

    resources: Resources
    caller: Caller
    job_id: str
    #: Raises ``NotAuthenticated`` once the key is not good any more.
    check_key: Callable[[], Awaitable[object]]

    async def answer(self, *, after: str | None) -> Response:
        """The events after one of them, or all; 204 once there are no more, which ends a browser's reconnecting.

        Raises:
            JobNotFound: there is none in the project.
            InvalidRequest: the job has no event ``after``.
        """
        found = await self._look()
        page = await self._read(after)
        if after is not None and found.status in ENDED and not page.data:
            return Response(status_code=204)
        return EventStream(self._events(found, page, after), close=_nothing, headers={})

    async def _events(
        self, found: JobVersion, page: ListObject[FineTuningJobEvent], after: str | None
    ) -> AsyncIterator[bytes]:
        try:
            while True:
                for event in page.data:
                    yield format_sse_event(data_str=event.model_dump_json(), id=event.id)
                after = page.last_id or after
                # The job was looked at before its events were read: the last of an ended one are among them.
                if not page.has_more and found.status in ENDED:
                    yield format_sse_event(event="end", data_str=json.dumps({"id": found.id, "status": found.status}))
                    return
                if not page.has_more:
                    found, waited_in_vain = await self._wait(found)
                    if self.resources.jobs.stopping:
                        return
                    if waited_in_vain:
                        yield format_sse_event(comment="still here")
                await self.check_key()
                page = await self._read(after)
        except (JobNotFound, NotAuthenticated):
            return  # deleted, or the key was revoked: it connects again, and is told so

    async def _wait(self, known: JobVersion) -> tuple[JobVersion, bool]:
        def more(found: JobVersion) -> bool:
            return (found.event_count, found.status) != (known.event_count, known.status)

        found = await self.resources.jobs.wait(self._look, more, seconds=HEARTBEAT_SECONDS)
        return found, not more(found)

    async def _look(self) -> JobVersion:
        return await polling.look_at(self.resources, self.caller, self.job_id)

    async def _read(self, after: str | None) -> ListObject[FineTuningJobEvent]:
        query = PageQuery(after=after, limit=PAGE_EVENTS, order=Order.ASC)
        return await run_in_threadpool(polling.read_events, self.resources, self.caller, self.job_id, query)


async def _nothing() -> None:
    """A stream of events holds nothing that is to be closed."""
