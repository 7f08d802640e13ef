"""What endpoints ask for. ``scope="function"`` ends the transaction before the response is sent: a commit that
fails is then a 500, not a lie. What needs no database is ``async``: that saves a journey to a thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from api.pagination import Order, PageQuery
from api.resources import Resources
from api.unit_of_work import UnitOfWork, open_unit_of_work


async def get_resources(request: Request) -> Resources:
    """What the lifespan opened."""
    resources: Resources = request.app.state.resources
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


def unit_of_work(resources: ResourcesDep) -> Iterator[UnitOfWork]:
    """The request's only transaction that writes; it begins with the first statement."""
    with open_unit_of_work(resources.sessions, resources.queue) as work:
        yield work


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
