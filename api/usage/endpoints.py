"""``/v1/organization/usage/completions`` as OpenAI's client asks for it, and ours, ``/v1/usage``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse

from api.auth import CallerDep
from api.dependencies import ReadSessionDep, ResourcesDep
from api.errors import UnsupportedParameter
from api.routing import Router
from api.usage import service
from api.usage.models import Operation
from api.usage.repository import Total, UsageFilter
from api.usage.schemas import (
    Bucket,
    BucketPage,
    BytesStored,
    CompletionsGroup,
    CompletionsResult,
    UsageGroup,
    UsagePage,
    UsageResult,
    Width,
)
from api.usage.service import Buckets, Period

R = TypeVar("R", bound=BaseModel)

router = Router(tags=["usage"])

#: The last second that a calendar has.
_LAST_SECOND = 253_402_300_798
Second = Annotated[int, Query(ge=0, le=_LAST_SECOND)]
Names = Annotated[list[str], Query(max_length=100)]
Limit = Annotated[int | None, Query(ge=1)]
_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}


@dataclass(frozen=True)
class Filters:
    """What both usages are filtered by."""

    key_ids: list[str]
    models: list[str]


def filters(
    api_key_ids: Annotated[Names, Query(alias="api_key_ids[]")] = [],  # noqa: B006 - FastAPI copies it
    models: Annotated[Names, Query(alias="models[]")] = [],  # noqa: B006 - FastAPI copies it
) -> Filters:
    """Lists as OpenAI's client writes them."""
    return Filters(api_key_ids, models)


FiltersDep = Annotated[Filters, Depends(filters)]


def refuse_unsupported(request: Request) -> None:
    """Raises ``UnsupportedParameter`` for a filter of OpenAI's that there is nothing here for."""
    asked = request.query_params
    for name in ("user_ids[]", "batch"):
        if name in asked and asked[name] != "false":
            raise UnsupportedParameter(f"The filter {name} is not offered; leave it out.", param=name)


@router.get("/organization/usage/completions", dependencies=[Depends(refuse_unsupported)])
def get_completions_usage(
    caller: CallerDep,
    session: ReadSessionDep,
    wanted: FiltersDep,
    start_time: Second,
    end_time: Second | None = None,
    bucket_width: Width = Width.DAY,
    limit: Limit = None,
    page: str | None = None,
    project_ids: Annotated[Names, Query(alias="project_ids[]")] = [],  # noqa: B006 - FastAPI copies it
    group_by: Annotated[list[CompletionsGroup], Query(alias="group_by[]")] = [],  # noqa: B006 - FastAPI copies it
) -> BucketPage[CompletionsResult]:
    """Requests and tokens of chat and other completions: of all projects, or without an organization-wide key of its
    own."""
    period = Period.of(start=start_time, end=end_time, width=bucket_width, limit=limit, page=page)
    of = service.filter_for(caller, project_ids=project_ids, key_ids=wanted.key_ids, models=wanted.models)
    found = service.read(session, of, period, by=group_by)
    return BucketPage(
        data=_show(found, CompletionsResult.of), has_more=found.next_page is not None, next_page=found.next_page
    )


@dataclass(frozen=True)
class OwnUsage:
    """Which of a project's usage is asked for."""

    filter: UsageFilter
    period: Period


def own_usage(
    caller: CallerDep,
    wanted: FiltersDep,
    start_time: Second | None = None,
    end_time: Second | None = None,
    bucket_width: Width = Width.DAY,
    limit: Limit = None,
    page: str | None = None,
    operations: Annotated[list[Operation], Query(alias="operations[]")] = [],  # noqa: B006 - FastAPI copies it
) -> OwnUsage:
    """The query parameters; without a start, a page of buckets until the end."""
    period = Period.of(start=start_time, end=end_time, width=bucket_width, limit=limit, page=page)
    return OwnUsage(UsageFilter({caller.project_id}, wanted.key_ids, wanted.models, operations), period)


OwnUsageDep = Annotated[OwnUsage, Depends(own_usage)]


@router.get("/usage", response_model=UsagePage, responses=_CSV)
def get_usage(
    request: Request,
    caller: CallerDep,
    session: ReadSessionDep,
    resources: ResourcesDep,
    asked: OwnUsageDep,
    group_by: Annotated[list[UsageGroup], Query(alias="group_by[]")] = [],  # noqa: B006 - FastAPI copies it
) -> UsagePage | Response:
    """What the project has used, in buckets, and what it has stored now; as CSV if it is accepted."""
    if request.headers.get("accept", "").startswith("text/csv"):
        return get_usage_csv(resources, asked)
    found = service.read(session, asked.filter, asked.period, by=group_by)
    return UsagePage(
        data=_show(found, UsageResult.of),
        has_more=found.next_page is not None,
        next_page=found.next_page,
        bytes_stored=BytesStored.of(service.bytes_stored(session, caller)),
    )


@router.get("/usage.csv", response_class=Response, responses=_CSV)
def get_usage_csv(resources: ResourcesDep, asked: OwnUsageDep) -> StreamingResponse:
    """The same as CSV: the whole period, a line for each bucket, key, model and operation."""
    lines = service.write_csv(resources.read_sessions, asked.filter, asked.period)
    headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


def _show(found: Buckets, show: Callable[[Total], R]) -> list[Bucket[R]]:
    return [
        Bucket(start_time=row.start, end_time=row.end, results=[show(total) for total in row.totals])
        for row in found.rows
    ]
