"""Cursor pages as OpenAI's clients read them: ``after`` is the id of the last row seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel
from sqlalchemy import Select
from sqlalchemy.orm import Session

from api.database import Listed
from api.errors import InvalidRequest

R = TypeVar("R", bound=Listed)


class Shown(BaseModel):
    """What a list can hold: its id is the client's cursor, so it must be unique."""

    id: str


S = TypeVar("S", bound=Shown)


class Order(StrEnum):
    """By age."""

    ASC = "asc"
    DESC = "desc"


@dataclass(frozen=True)
class PageQuery:
    """Which page."""

    after: str | None = None
    limit: int = 20
    order: Order = Order.DESC


@dataclass(frozen=True)
class Page(Generic[R]):
    """Rows of one page, and whether there are more behind it."""

    rows: Sequence[R]
    has_more: bool


class ListObject(BaseModel, Generic[S]):
    """OpenAI's list. ``has_more`` is always there: a client goes on asking until a page is empty otherwise."""

    object: Literal["list"] = "list"
    data: list[S]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, page: Page[R], show: Callable[[R], S]) -> ListObject[S]:
        """The list of a page, each row shown by ``show``."""
        return cls.whole([show(row) for row in page.rows], has_more=page.has_more)

    @classmethod
    def whole(cls, data: list[S], *, has_more: bool = False) -> ListObject[S]:
        """The list of rows that are shown already."""
        return cls(
            data=data,
            has_more=has_more,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )


def paginate(
    session: Session,
    statement: Select[R],
    *,
    model: type[Any],
    query: PageQuery,
    cursors: Select[R] | None = None,
) -> Page[R]:
    """One page of ``statement``, ordered by ``model.seq``.

    Args:
        session: the session of the unit of work.
        statement: the rows to page through, tenancy included.
        model: their ORM class.
        query: cursor, size and order.
        cursors: the rows that may be named by ``after``, where these are more than those shown.

    Raises:
        InvalidRequest: ``after`` names no such row.
    """
    statement = _of_page(session, statement, model=model, query=query, cursors=cursors)
    rows = session.scalars(statement).all()
    return Page(rows=rows[: query.limit], has_more=len(rows) > query.limit)


def page_key(
    session: Session,
    statement: Select[R],
    *columns: Any,
    model: type[Any],
    query: PageQuery,
    cursors: Select[R] | None = None,
) -> list[tuple[Any, ...]]:
    """``columns`` of the rows that `paginate` reads for the same page; these tell whether it changed."""
    statement = _of_page(session, statement, model=model, query=query, cursors=cursors)
    return [tuple(row) for row in session.execute(statement.with_only_columns(*columns))]


def _of_page(
    session: Session, statement: Select[R], *, model: type[Any], query: PageQuery, cursors: Select[R] | None
) -> Select[R]:
    """The rows of a page and one more, which tells that there is another page."""
    descending = query.order is Order.DESC
    if query.after is not None:
        seq = _cursor(session, statement if cursors is None else cursors, model=model, after=query.after)
        statement = statement.where(model.seq < seq if descending else model.seq > seq)
    return statement.order_by(model.seq.desc() if descending else model.seq.asc()).limit(query.limit + 1)


def _cursor(session: Session, cursors: Select[R], *, model: type[Any], after: str) -> int:
    seq: int | None = session.scalar(cursors.with_only_columns(model.seq).where(model.id == after))
    if seq is None:
        raise InvalidRequest(f"No row {after!r} in this list; give the id of a row of the page before.", param="after")
    return seq
