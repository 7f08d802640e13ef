"""Servers, databases and queues of the tests: real ones, small."""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
import pytest
import redis
import uvicorn
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from api.database import new_id, now
from api.engines.models import EngineReplica
from api.projects.service import create_api_key, create_project
from api.queue import TaskName
from api.settings import Settings
from tests.api.engine import ScriptedEngine

ROOT = Path(__file__).parents[2]
POSTGRES = "127.0.0.1:5432"
REDIS = "127.0.0.1:6379"
#: Reading the machine's certificates would take longer than most tests, which have no use for them.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class RecordingQueue:
    """A queue that keeps its messages, or fails to take them."""

    def __init__(self) -> None:
        self.messages: list[tuple[TaskName, str]] = []
        self.broken = False

    def reset(self) -> None:
        """Forget all messages, and work again."""
        self.messages.clear()
        self.broken = False

    def send(self, task: TaskName, job_id: str) -> None:
        """Keep the message."""
        if self.broken:
            raise ConnectionError("the broker is down")
        self.messages.append((task, job_id))


@dataclass(frozen=True)
class Tenant:
    """A project with a key."""

    project_id: str
    slug: str
    key: str


@dataclass(frozen=True)
class Service:
    """A running api and all that it stands on."""

    url: str
    settings: Settings
    database: Engine
    sessions: sessionmaker[Session]
    queue: RecordingQueue
    engine: ScriptedEngine
    tenant: Tenant
    stranger: Tenant
    _open: list[Any] = field(default_factory=list)

    def client(self, tenant: Tenant | None = None, **options: Any) -> openai.OpenAI:
        """The official client, which repeats nothing unless it is told to."""
        options = {"max_retries": 0, "timeout": 20, **options}
        key = (tenant or self.tenant).key
        transport = openai.DefaultHttpxClient(verify=NO_TLS)
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, http_client=transport, **options)
        self._open.append(client)
        return client

    def http(self, tenant: Tenant | None = None, **options: Any) -> httpx.Client:
        """Plain HTTP with the tenant's key."""
        headers = {"Authorization": f"Bearer {(tenant or self.tenant).key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=NO_TLS, **options)
        self._open.append(client)
        return client

    def stored_files(self) -> list[str]:
        """What lies in the object store, hidden parts included."""
        return sorted(path.name for path in self.settings.storage_dir.iterdir())

    def close(self) -> None:
        """Close the clients."""
        for client in self._open:
            client.close()


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """Run the app in a real uvicorn on a free port; gives its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server ended while it started"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still false after {seconds} s"
        time.sleep(0.01)


def make_tenant(session: Session, name: str) -> Tenant:
    """Add a project and a key."""
    project = create_project(session, name)
    key = create_api_key(session, project, name="tests")
    return Tenant(project_id=project.id, slug=project.slug, key=key)


def register_engine(sessions: sessionmaker[Session], url: str, **values: Any) -> str:
    """Add an engine that needs no heartbeat for as long as the tests run; returns its id."""
    tomorrow = now() + timedelta(days=1)
    row = {"base_model": "tiny", "base_digest": "0" * 64, "capacity": 4, "heartbeat_at": tomorrow} | values
    with sessions.begin() as session:
        session.add(engine := EngineReplica(id=new_id("engine-"), url=url, **row))
    return engine.id


def alembic_config(url: str) -> Config:
    """Alembic for the database at ``url``."""
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def migrate(url: str) -> None:
    """Bring the database to head."""
    command.upgrade(alembic_config(url), "head")


def postgres_refusal() -> str | None:
    """Why PostgreSQL cannot be used; None if it can."""
    try:
        with psycopg.connect(f"postgresql://postgres@{POSTGRES}/postgres", connect_timeout=3):
            return None
    except psycopg.OperationalError as error:
        return f"NOT TESTED on PostgreSQL: {POSTGRES} does not let the user postgres in ({error})"


@contextmanager
def empty_database(dialect: str, folder: Path) -> Iterator[str]:
    """A throw-away database; gives its URL, and skips the test where PostgreSQL does not answer."""
    if dialect == "sqlite":
        yield f"sqlite:///{folder / 'made' / 'uora.db'}"
        return
    refusal = postgres_refusal()
    if refusal is not None:
        pytest.skip(refusal)
    name = f"uora_test_{secrets.token_hex(6)}"
    with psycopg.connect(f"postgresql://postgres@{POSTGRES}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield f"postgresql+psycopg://postgres@{POSTGRES}/{name}"
        finally:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def empty_broker() -> Iterator[str]:
    """A Redis database of the test's own, empty again afterwards; gives its URL, and skips the test where Redis does
    not answer."""
    urls = [f"redis://{REDIS}/{number}" for number in range(15, 0, -1)]
    try:
        url = next((url for url in urls if _claim(url)), None)
    except redis.ConnectionError as error:
        pytest.skip(f"NOT TESTED on Redis: {REDIS} does not answer ({error})")
    assert url, f"no database of the Redis on {REDIS} is empty"
    try:
        yield url
    finally:
        with redis.Redis.from_url(url) as client:
            client.flushdb()


def _claim(url: str) -> bool:
    """Whether the database was empty and nobody's; from now on it is the caller's."""
    mark = "claimed-by-a-test"
    with redis.Redis.from_url(url, socket_connect_timeout=3) as client:
        if not client.set(mark, "", nx=True):
            return False
        if client.dbsize() == 1:
            return True
        client.delete(mark)
        return False
