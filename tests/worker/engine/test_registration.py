"""An engine's row: when it is there, what it says, and when it is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta

import pytest
import structlog
from sqlalchemy import select, text, update
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs
from structlog.typing import EventDict

from api.database import database_now
from api.engines import repository
from api.engines.models import EngineReplica, Load
from tests.api.support import serve
from tests.worker.support import Service, wait_until
from worker.engine.registration import Description, Registration
from worker.sweeping import sweep

TTL = timedelta(seconds=5)
INTERVAL = timedelta(seconds=0.05)
Make = Callable[..., Registration]


class Address:
    """What answers where the engine says that it is."""

    def __init__(self) -> None:
        self.id: str | None = None

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/readyz", self._ready)])

    async def _ready(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "id": self.id})


@pytest.fixture
def make(any_service: Service) -> Iterator[Make]:
    """Makes a registration that answers under its address; all are stopped in the end."""
    with ExitStack() as stack:
        address = Address()
        url = stack.enter_context(serve(address.app()))

        def make(*, load: Load | None = None, answers: bool = True) -> Registration:
            description = Description(url=url, base_model="tiny", base_digest="d" * 64, capacity=4)
            now: Load = load if load is not None else {"running": 0, "waiting": 0, "resident": 0}
            registration = Registration(any_service.sessions, description, load=lambda: now, interval=INTERVAL)
            address.id = registration.id if answers else "another"
            registration.start()
            stack.callback(registration.stop)
            return registration

        yield make


def rows(service: Service) -> list[EngineReplica]:
    with service.sessions() as session:
        return list(session.scalars(select(EngineReplica)))


def test_it_registers_renews_and_leaves(any_service: Service, make: Make) -> None:
    load: Load = {"running": 0, "waiting": 0, "resident": 0}
    registration = make(load=load)
    wait_until(lambda: rows(any_service), what="the row")
    (first,) = rows(any_service)
    assert (first.id, first.base_model, first.base_digest, first.capacity) == (registration.id, "tiny", "d" * 64, 4)

    load |= {"running": 3, "waiting": 2, "resident": 7}
    wait_until(lambda: rows(any_service)[0].running == 3, what="the load")
    (later,) = rows(any_service)
    assert (later.waiting, later.resident, later.created_at) == (2, 7, first.created_at)
    assert later.heartbeat_at > first.heartbeat_at
    with any_service.sessions() as session:
        ((live, age),) = repository.live(session, ttl=TTL)
        assert (live.id, timedelta(0) <= age < TTL) == (registration.id, True)
        assert abs(database_now(session) - live.heartbeat_at) < TTL

    registration.stop()
    assert rows(any_service) == []


def test_it_does_not_register_where_another_answers(any_service: Service, make: Make) -> None:
    with capture_logs() as logs:
        make(answers=False)
        wait_until(lambda: logs, what="a message")
    assert "UORA_ENGINE_ADVERTISE_URL" in logs[0]["error"]
    assert rows(any_service) == []


def test_it_outlives_the_database(any_service: Service, make: Make) -> None:
    with capture_logs() as logs:
        make()
        wait_until(lambda: logs, what="the row")  # of which it tells after it is committed
        rename(any_service, "engines", "away")
        wait_until(lambda: len(logs) > 1, what="a message")
        time.sleep(5 * INTERVAL.total_seconds())
        before = heartbeat(any_service, "away")
        rename(any_service, "away", "engines")
        wait_until(lambda: len(logs) > 2, what="the end of the outage")
    events = [log["event"] for log in logs]
    assert events == ["engine_registered", "engine_not_registered", "engine_registered_again"]
    wait_until(lambda: heartbeat(any_service, "engines") > before, what="a heartbeat")


def test_it_outlives_a_log_that_cannot_be_written(any_service: Service, make: Make) -> None:
    """As when the pipe of the engine's output is closed, or its disk full."""
    refused = []

    def refuse(_logger: object, _name: str, event: EventDict) -> EventDict:
        refused.append(event["event"])
        raise BrokenPipeError("nobody reads this")

    configured = structlog.get_config()["processors"]
    structlog.configure(processors=[refuse])
    try:
        registration = make()
        wait_until(lambda: rows(any_service), what="the row")
        rename(any_service, "engines", "away")
        wait_until(lambda: "engine_not_registered" in refused, what="the outage")
        before = heartbeat(any_service, "away")
        rename(any_service, "away", "engines")
        wait_until(lambda: heartbeat(any_service, "engines") > before, what="a heartbeat")
        wait_until(lambda: "engine_registered_again" in refused, what="the end of the outage")
        registration.stop()
    finally:
        structlog.configure(processors=configured)
    assert refused == ["engine_registered", "engine_not_registered", "engine_registered_again"]
    assert rows(any_service) == []


def test_a_row_that_was_swept_comes_back(any_service: Service, make: Make) -> None:
    registration = make()
    wait_until(lambda: rows(any_service), what="the row")
    with any_service.sessions.begin() as session:
        repository.remove(session, registration.id)
    wait_until(lambda: [row.id for row in rows(any_service)] == [registration.id], what="the row again")


def test_a_restarted_engine_replaces_the_one_that_was_killed(any_service: Service) -> None:
    for name in ("killed", "other", "new"):
        url = "http://other" if name == "other" else "http://engine"
        with any_service.sessions.begin() as session:
            repository.add(session, engine_id=name, url=url, base_model="tiny", base_digest="d" * 64, capacity=4)
    assert {row.id for row in rows(any_service)} == {"other", "new"}


def test_silent_engines_are_dead_and_forgotten_later(any_service: Service) -> None:
    def add(name: str, *, silent_for: timedelta) -> None:
        with any_service.sessions.begin() as session:
            repository.add(
                session, engine_id=name, url=f"http://{name}", base_model="tiny", base_digest="d" * 64, capacity=4
            )
            moment = database_now(session) - silent_for
            session.execute(update(EngineReplica).where(EngineReplica.id == name).values(heartbeat_at=moment))

    add("alive", silent_for=timedelta(0))
    add("dead", silent_for=timedelta(seconds=6))
    add("forgotten", silent_for=timedelta(seconds=61))
    with any_service.sessions() as session:
        assert [row.id for row, _ in repository.live(session, ttl=TTL)] == ["alive"]
    sweep(any_service.resources())
    assert {row.id for row in rows(any_service)} == {"alive", "dead"}


def rename(service: Service, old: str, new: str) -> None:
    with service.engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))


def heartbeat(service: Service, table: str) -> str:
    with service.engine.connect() as connection:
        return str(connection.execute(text(f"SELECT heartbeat_at FROM {table}")).scalar_one())  # noqa: S608
