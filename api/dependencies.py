"""What endpoints ask for. ``scope="function"`` ends the transaction before the response is sent: a commit that
fails is then a 500, not a lie. What needs no database is ``async``: that saves a journey to a thread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Annotated

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from api.audit import service as audit
from api.auth import CallerDep
from api.caller import Caller
from api.idempotency import service as idempotency
from api.idempotency.attempt import Attempt, AttemptDep
from api.pagination import Order, PageQuery
from api.resources import ResourcesDep
from api.routing import Operation
from api.unit_of_work import UnitOfWork, open_unit_of_work

__all__ = ["PageParams", "ReadSessionDep", "ResourcesDep", "SessionDep", "WorkDep"]


def unit_of_work(
    request: Request, resources: ResourcesDep, caller: CallerDep, attempt: AttemptDep
) -> Iterator[UnitOfWork]:
    """The request's only transaction that writes; it begins with the first statement.

    What the request changes, the audit log's line about it and the answer for its repetitions commit together.
    """
    claim = None if attempt is None else partial(idempotency.claim, attempt=attempt, sessions=resources.sessions)
    with open_unit_of_work(resources.sessions, resources.queue, on_begin=claim) as work:
        yield work
        if work.has_begun:
            _write_down(work, request, caller, attempt)


def _write_down(work: UnitOfWork, request: Request, caller: Caller, attempt: Attempt | None) -> None:
    answer: Response = request.state.answer
    body = bytes(answer.body).decode()
    object_id = _object_id(request, body)
    origin = audit.Origin(
        action=Operation.of(request).action,
        request_id=request.state.request_id,
        ip_address=request.client.host if request.client else None,
    )
    audit.record(work, caller, origin, object_id=object_id)
    if attempt is not None:
        idempotency.keep(work, attempt, status=answer.status_code, body=body, object_id=object_id)


def _object_id(request: Request, body: str) -> str | None:
    """What the request was about: the id in its answer, else the last one in its path."""
    shown = json.loads(body)
    in_path = next(reversed(request.path_params.values()), None)
    found = shown.get("id") or shown.get("first_id") or in_path
    return None if found is None else str(found)


WorkDep = Annotated[UnitOfWork, Depends(unit_of_work, scope="function")]


async def session_of(work: WorkDep) -> Session:
    """The session alone, for services that neither send nor act after the commit."""
    return work.session


SessionDep = Annotated[Session, Depends(session_of, scope="function")]


def read_session(resources: ResourcesDep) -> Iterator[Session]:
    """A session whose changes are dropped."""
    with resources.read_sessions() as session:
        yield session


ReadSessionDep = Annotated[Session, Depends(read_session, scope="function")]


class PageParams:
    """The query parameters of a list.

    Args:
        default_limit: rows of a page if the client asks for no number.
        max_limit: rows of a page at most.
    """

    def __init__(self, *, default_limit: int, max_limit: int = 1000) -> None:
        self._default_limit = default_limit
        self._max_limit = max_limit

    async def __call__(
        self,
        after: Annotated[str | None, Query(max_length=256)] = None,
        limit: Annotated[int | None, Query(ge=1)] = None,
        order: Order = Order.DESC,
    ) -> PageQuery:
        """Parse them. More rows than ``max_limit`` are given in several pages, as ``has_more`` says."""
        size = min(limit or self._default_limit, self._max_limit)
        return PageQuery(after=after, limit=size, order=order)
