"""A client that follows the cursors sees each row once, in order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from api.database import Base, make_engine, make_sessions, new_id
from api.errors import InvalidRequest
from api.pagination import ListObject, Order, PageQuery, Shown, paginate
from api.projects.models import Project
from tests.api.rows import add_file, add_job
from tests.api.support import Service


@pytest.fixture(scope="module")
def memory() -> Any:
    """A database of this module's own."""
    engine: Engine = make_engine("sqlite://")
    Base.metadata.create_all(engine)
    yield make_sessions(engine)
    engine.dispose()


@given(
    n_rows=st.integers(0, 30),
    limit=st.integers(1, 12),
    order=st.sampled_from(Order),
    inserts=st.lists(st.integers(0, 5), max_size=5),
)
def test_pages_visit_each_row_once(memory: Any, n_rows: int, limit: int, order: Order, inserts: list[int]) -> None:
    """Rows that come while a client pages neither hide nor repeat one that was there."""
    name = new_id("page-")
    with memory() as session:

        def insert(count: int) -> list[str]:
            rows = [Project(id=new_id("proj_"), name=name, slug=new_id("")) for _ in range(count)]
            for row in rows:
                session.add(row)
                session.flush()
            return [row.id for row in rows]

        there = insert(n_rows)
        seen: list[str] = []
        while True:
            query = PageQuery(after=seen[-1] if seen else None, limit=limit, order=order)
            page = read(session, name, query)
            seen += [row.id for row in page.rows]
            assert len(page.rows) <= limit
            if not page.has_more:
                break
            insert(inserts.pop() if inserts else 0)
        assert len(seen) == len(set(seen))
        expected = there if order is Order.ASC else there[::-1]
        assert [row for row in seen if row in there] == expected
        session.rollback()


def read(session: Session, name: str, query: PageQuery) -> Any:
    """One page of the projects of that name."""
    return paginate(session, select(Project).where(Project.name == name), model=Project, query=query)


def test_an_unknown_cursor_is_an_error_not_the_first_page(memory: Any) -> None:
    with memory() as session, pytest.raises(InvalidRequest) as caught:
        read(session, "x", PageQuery(after="proj_unknown"))
    assert caught.value.param == "after"


def test_the_client_follows_every_list_to_its_end(service: Service, client: OpenAI) -> None:
    with service.sessions.begin() as session:
        jobs = [add_job(session, service.tenant).id for _ in range(7)]
        files = [add_file(session, service.tenant).id for _ in range(7)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=3)] == jobs[::-1]
    assert [file.id for file in client.files.list(limit=3, order="asc")] == files


def test_a_list_always_says_whether_there_is_more(service: Service) -> None:
    with service.sessions.begin() as session:
        ids = [add_job(session, service.tenant).id for _ in range(2)]
    http = service.http()

    def shape(url: str) -> tuple[Any, ...]:
        answer = http.get(url).json()
        assert set(answer) == {"object", "data", "has_more", "first_id", "last_id"}
        return answer["object"], answer["has_more"], answer["first_id"], answer["last_id"]

    assert shape("/v1/fine_tuning/jobs?limit=1") == ("list", True, ids[1], ids[1])
    assert shape("/v1/fine_tuning/jobs") == ("list", False, ids[1], ids[0])
    assert shape("/v1/files") == ("list", False, None, None)
    assert shape("/v1/models")[1] is False
    assert http.get("/v1/fine_tuning/jobs?limit=5000").status_code == 200


def test_an_empty_list() -> None:
    empty: ListObject[Shown] = ListObject.whole([])
    assert (empty.data, empty.has_more, empty.first_id, empty.last_id) == ([], False, None, None)
