"""Routing over several scripted engines, through the live api."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import delete, update

from api.database import make_read_sessions, now
from api.engines import service as engines_service
from api.engines.client import EngineClient
from api.engines.models import EngineReplica
from api.engines.service import EngineDirectory
from api.errors import EngineUnavailable, NoEngine
from api.main import create_app
from tests.api.engine import HELLO, START, TOKEN, ScriptedEngine, delta, finish
from tests.api.support import RecordingQueue, Service, register_engine, serve

HI: list[Any] = [{"role": "user", "content": "hi"}]
#: Nothing listens there.
NOWHERE = "http://127.0.0.1:9"
BUSY = (503, {"error": {"code": "engine_busy", "message": "full", "param": None}})
STOPPING = (503, {"error": {"code": "engine_stopping", "message": "leaving", "param": None}})
BROKEN = (500, {"error": {"code": "internal", "message": "fault", "param": None}})

Start = Callable[..., ScriptedEngine]


@pytest.fixture(scope="module")
def routed_url(live_service: Service) -> Iterator[str]:
    """An api whose one base model nobody serves yet."""
    settings = live_service.settings.model_copy(update={"base_models": {"routed": "path:/nowhere"}})
    with serve(create_app(settings, queue=RecordingQueue())) as url:
        yield url


@pytest.fixture
def routed(service: Service, routed_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The same, which looks into the table at each request."""
    monkeypatch.setattr(engines_service, "MAX_AGE_SECONDS", 0.0)
    yield replace(service, url=routed_url)
    with service.sessions.begin() as session:
        session.execute(delete(EngineReplica).where(EngineReplica.base_model == "routed"))


@pytest.fixture
def start(routed: Service) -> Iterator[Start]:
    """Starts a scripted engine and registers it."""
    with ExitStack() as stack:

        def start(**values: Any) -> ScriptedEngine:
            engine = ScriptedEngine(refusal=values.pop("refusal", None), lines=values.pop("lines", list(HELLO)))
            register_engine(routed.sessions, stack.enter_context(serve(engine.app())), base_model="routed", **values)
            return engine

        yield start


class HangingUp:
    """A server that reads a request and ends the connection."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection:
                    connection.recv(65536)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def hanging_up() -> Iterator[HangingUp]:
    server = HangingUp()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def ask(routed: Service, **options: Any) -> str | None:
    answer = routed.client(**options).chat.completions.create(model="routed", messages=HI)
    return answer.choices[0].message.content


def counts(*engines: ScriptedEngine) -> list[int]:
    return [len(engine.requests) for engine in engines]


def test_the_least_loaded_for_its_size_takes_it(routed: Service, start: Start) -> None:
    small, large = start(running=2, waiting=1, capacity=4), start(running=4, waiting=4, capacity=16)
    for _ in range(3):
        assert ask(routed) == "Hello"
    assert counts(small, large) == [0, 3]


def test_what_was_sent_since_the_heartbeat_counts(routed: Service, start: Start) -> None:
    one, two = start(heartbeat_at=now()), start(heartbeat_at=now())
    for engine in (one, two):
        engine.lines, engine.pause_seconds = [START, *(delta(str(step)) for step in range(100)), finish()], 0.05
    streams = [
        routed.client().chat.completions.create(model="routed", messages=HI, stream=True, timeout=20) for _ in range(6)
    ]
    assert counts(one, two) == [3, 3]
    for stream in streams:
        stream.close()


def test_equals_share(routed: Service, start: Start) -> None:
    engines = [start() for _ in range(2)]
    for _ in range(20):
        ask(routed)
    assert min(counts(*engines)) > 0  # fails once in half a million runs


@pytest.mark.parametrize("refusal", [BUSY, STOPPING], ids=["busy", "stopping"])
def test_another_takes_what_one_cannot(routed: Service, start: Start, refusal: tuple[int, dict[str, Any]]) -> None:
    refusing, other = start(refusal=refusal), start(running=3)
    assert ask(routed) == "Hello"
    assert counts(refusing, other) == [1, 1]


def test_one_that_cannot_be_reached_is_passed_over(routed: Service, start: Start) -> None:
    register_engine(routed.sessions, NOWHERE, base_model="routed")
    other = start(running=3)
    for _ in range(2):
        assert ask(routed) == "Hello"
    assert counts(other) == [2]


def test_all_are_busy(routed: Service, start: Start) -> None:
    register_engine(routed.sessions, NOWHERE, base_model="routed", running=4)
    engines = [start(refusal=BUSY), start(refusal=STOPPING)]
    with pytest.raises(openai.InternalServerError) as caught:
        ask(routed)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_busy")
    assert caught.value.response.headers["retry-after"] == "1"
    assert counts(*engines) == [1, 1]


def test_none_can_be_reached(routed: Service) -> None:
    register_engine(routed.sessions, NOWHERE, base_model="routed")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(routed)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert caught.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("refusal", "lines"), [(BROKEN, HELLO), (None, [START, delta("Hel")])], ids=["refused", "broken off"]
)
def test_what_was_begun_is_not_sent_again(
    routed: Service, start: Start, refusal: tuple[int, dict[str, Any]] | None, lines: list[Any]
) -> None:
    first, other = start(refusal=refusal, lines=lines), start(running=3)
    with pytest.raises(openai.InternalServerError):
        ask(routed)
    assert counts(first, other) == [1, 0]


def test_what_is_lost_before_its_answer_goes_to_one_more(routed: Service, start: Start) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(hanging_up()) for _ in range(2))
        register_engine(routed.sessions, first.url, base_model="routed")
        other = start(running=1)
        assert ask(routed) == "Hello"
        assert (first.connections, counts(other)) == (1, [1])

        register_engine(routed.sessions, second.url, base_model="routed")
        last = start(running=2)
        other.refusal = BUSY
        with routed.sessions.begin() as session:  # the first gives a heartbeat: it is no suspect any more
            session.execute(update(EngineReplica).values(heartbeat_at=now() + timedelta(days=2)))
        with pytest.raises(openai.InternalServerError) as caught:
            ask(routed)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_interrupted")
        assert (first.connections, second.connections, counts(other, last)) == (2, 1, [1, 0])


def test_the_dead_and_those_of_other_base_models_are_no_choice(routed: Service, start: Start) -> None:
    dead = start(heartbeat_at=now() - timedelta(seconds=6))
    for _ in range(2):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(routed)
    assert (caught.value.status_code, caught.value.code) == (503, "no_engine")
    assert "UORA_ENGINE_BASE_MODEL=routed " in caught.value.message
    assert caught.value.response.headers["retry-after"] == "1"
    assert counts(dead, routed.engine) == [0, 0]


def test_the_table_is_read_twice_a_second_at_most(service: Service) -> None:
    register_engine(service.sessions, NOWHERE, base_model="cached")

    async def look() -> list[int]:
        directory = EngineDirectory(make_read_sessions(service.database), ttl=timedelta(seconds=5))
        seen = [len(await directory.ranked("cached"))]
        with service.sessions.begin() as session:
            session.execute(delete(EngineReplica).where(EngineReplica.base_model == "cached"))
        seen.append(len(await directory.ranked("cached")))
        await asyncio.sleep(engines_service.MAX_AGE_SECONDS)
        return [*seen, len(await directory.ranked("cached"))]

    assert asyncio.run(look()) == [1, 1, 0]


def test_a_suspect_comes_last_until_its_next_heartbeat(service: Service) -> None:
    class Later(EngineDirectory):
        def _read(self) -> list[engines_service.LiveEngine]:
            return heard.pop(0)

    idle = engines_service.LiveEngine("engine-1", NOWHERE, "m", load=0, capacity=4, heartbeat_at=now(), heard_at=0.0)
    full = replace(idle, id="engine-2", load=4)
    heard = [[idle, full], [replace(idle, heartbeat_at=now() + timedelta(seconds=1)), full]]

    async def look() -> list[str]:
        directory = Later(service.sessions, ttl=timedelta(seconds=5))
        first = (await directory.ranked("m"))[0]
        directory.suspect(first)
        second = (await directory.ranked("m"))[0]
        await asyncio.sleep(engines_service.MAX_AGE_SECONDS)
        return [first.id, second.id, (await directory.ranked("m"))[0].id]

    assert asyncio.run(look()) == ["engine-1", "engine-2", "engine-1"]


def test_a_whole_answer_at_once(routed: Service, start: Start) -> None:
    engine = start()

    async def post(base_model: str) -> httpx.Response:
        async with httpx.AsyncClient() as http:
            directory = EngineDirectory(make_read_sessions(routed.database), ttl=timedelta(seconds=5))
            return await EngineClient(http, directory, token=TOKEN).post("/generate", {"n": 1}, base_model=base_model)

    answer = asyncio.run(post("routed"))
    assert (answer.status_code, len(answer.text.splitlines())) == (200, len(HELLO))
    assert engine.requests == [{"n": 1}]
    with pytest.raises(NoEngine):
        asyncio.run(post("other"))
    engine.token = "another"
    with pytest.raises(EngineUnavailable):
        asyncio.run(post("routed"))


def test_an_engine_that_has_just_come_is_asked_where_the_known_ones_take_nothing(service: Service) -> None:
    class Counted(EngineDirectory):
        reads = 0

        def _read(self) -> list[engines_service.LiveEngine]:
            self.reads += 1
            return super()._read()

    async def look() -> tuple[list[str], list[str], int]:
        directory = Counted(make_read_sessions(service.database), ttl=timedelta(seconds=5))
        known = register_engine(service.sessions, NOWHERE, base_model="came")
        await directory.live()
        came = register_engine(service.sessions, f"{NOWHERE}/other", base_model="came")
        taken = [(await anext(aiter(directory.candidates("came")))).id]
        return [*taken, known, came], [each.id async for each in directory.candidates("came")], directory.reads

    (first, known, came), asked, reads = asyncio.run(look())
    with service.sessions.begin() as session:
        session.query(EngineReplica).filter_by(base_model="came").delete()  # other tests count them
    assert first == known
    assert asked == [known, came]
    assert reads == 2
