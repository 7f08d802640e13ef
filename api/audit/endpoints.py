"""``/v1/organization/audit_logs``"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Query, Request

from api.audit import service
from api.audit.repository import AuditFilter
from api.audit.schemas import AuditLogObject
from api.auth import CallerDep
from api.dependencies import PageParams, ReadSessionDep
from api.errors import UnsupportedParameter
from api.pagination import ListObject, PageQuery
from api.routing import Router

router = Router(prefix="/organization/audit_logs", tags=["administration"])

AuditPage = Annotated[PageQuery, Depends(PageParams(default_limit=20, max_limit=100))]
#: The last second that a calendar has.
_LAST_SECOND = 253_402_300_798
Seconds = Annotated[int | None, Query(ge=0, le=_LAST_SECOND)]
Names = Annotated[list[str], Query(max_length=100)]


#: Filters of OpenAI's that there is nothing here for.
_UNSUPPORTED = ("before", "actor_emails[]", "tenant_only")


def audit_filter(
    request: Request,
    project_ids: Annotated[Names, Query(alias="project_ids[]")] = [],  # noqa: B006 - FastAPI copies it
    event_types: Annotated[Names, Query(alias="event_types[]")] = [],  # noqa: B006 - FastAPI copies it
    actor_ids: Annotated[Names, Query(alias="actor_ids[]")] = [],  # noqa: B006 - FastAPI copies it
    resource_ids: Annotated[Names, Query(alias="resource_ids[]")] = [],  # noqa: B006 - FastAPI copies it
    gte: Annotated[Seconds, Query(alias="effective_at[gte]")] = None,
    gt: Annotated[Seconds, Query(alias="effective_at[gt]")] = None,
    lte: Annotated[Seconds, Query(alias="effective_at[lte]")] = None,
    lt: Annotated[Seconds, Query(alias="effective_at[lt]")] = None,
) -> AuditFilter:
    """The filters as OpenAI's client writes them; of the time of an entry, its whole seconds count.

    Raises:
        UnsupportedParameter: a filter that is not offered.
    """
    for name in _UNSUPPORTED:
        if name in request.query_params:
            raise UnsupportedParameter(f"The filter {name} is not offered; leave it out.", param=name)
    return AuditFilter(
        project_ids=project_ids,
        actions=event_types,
        key_ids=actor_ids,
        object_ids=resource_ids,
        since=_moment(max((second for second in (gte, _next(gt)) if second is not None), default=None)),
        before=_moment(min((second for second in (_next(lte), lt) if second is not None), default=None)),
    )


@router.get("")
def list_audit_logs(
    caller: CallerDep,
    session: ReadSessionDep,
    query: AuditPage,
    wanted: Annotated[AuditFilter, Depends(audit_filter)],
) -> ListObject[AuditLogObject]:
    """List what was changed, by which key, newest first."""
    return ListObject.of(service.list_entries(session, caller, query=query, wanted=wanted), AuditLogObject.of)


def _next(second: int | None) -> int | None:
    return None if second is None else second + 1


def _moment(second: int | None) -> datetime | None:
    return None if second is None else datetime.fromtimestamp(second, UTC)
