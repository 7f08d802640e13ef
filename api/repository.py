"""The base of all repositories of a project's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from api.database import Listed
from api.errors import NotFound
from api.pagination import Page, PageQuery, page_key, paginate

R = TypeVar("R", bound=Listed)


class Repository(Generic[R]):
    """Rows of one project. There is no query here that could see another project's.

    One subclass has one, for what other projects share: ``AdapterRepository.usable``.

    Args:
        session: the session of the unit of work.
        project_id: the tenant. It is part of the statement that every query starts from.
    """

    model: ClassVar[type[Any]]
    missing: ClassVar[type[NotFound]] = NotFound
    noun: ClassVar[str] = "object"

    def __init__(self, session: Session, project_id: str) -> None:
        if not project_id:
            raise ValueError(f"{type(self).__name__} needs a project id, found {project_id!r}")
        self.session = session
        self.project_id = project_id

    def every(self) -> Select[R]:
        """All rows of the project, those that are no longer shown included."""
        return select(self.model).where(self.model.project_id == self.project_id)

    def visible(self) -> Select[R]:
        """The rows that callers may see."""
        return self.every()

    def find(self, row_id: str) -> R | None:
        """The row, or None."""
        return self.session.scalar(self.visible().where(self.model.id == row_id))

    def get(self, row_id: str, *, param: str | None = None) -> R:
        """The row.

        Raises:
            NotFound: there is none in this project.
        """
        row = self.find(row_id)
        if row is None:
            raise self.missing(f"No such {self.noun}: {row_id!r}.", param=param)
        return row

    def page(self, query: PageQuery, *criteria: ColumnElement[bool]) -> Page[R]:
        """One page of the visible rows that meet ``criteria``."""
        return paginate(
            self.session,
            self.visible().where(*criteria),
            model=self.model,
            query=query,
            cursors=self.every(),
        )

    def page_key(
        self, columns: Sequence[Any], query: PageQuery, *criteria: ColumnElement[bool]
    ) -> list[tuple[Any, ...]]:
        """``columns`` of the rows of a page."""
        return page_key(
            self.session,
            self.visible().where(*criteria),
            *columns,
            model=self.model,
            query=query,
            cursors=self.every(),
        )

    def add(self, row: R) -> R:
        """Insert the row now, so that its constraints speak now."""
        self.session.add(row)
        self.session.flush()
        return row
