"""Fixtures of all tests that talk to the api.

One live api for each kind of database, which the migrations made; each test has two new projects in it, so that
what one test leaves is another project's, which no test can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from openai import OpenAI
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from api.database import make_engine, make_sessions
from api.main import create_app
from api.settings import Settings
from tests.api.engine import TOKEN, ScriptedEngine
from tests.api.support import (
    RecordingQueue,
    Service,
    Tenant,
    empty_database,
    make_tenant,
    migrate,
    register_engine,
    serve,
)


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A migrated database."""
    with empty_database(request.param, tmp_path_factory.mktemp("database")) as url:
        migrate(url)
        yield url


@pytest.fixture(scope="session")
def database(database_url: str) -> Iterator[Engine]:
    """The tests' own connections, beside those of the api."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def sessions(database: Engine) -> sessionmaker[Session]:
    """Sessions on them."""
    return make_sessions(database)


@pytest.fixture
def tenants(sessions: sessionmaker[Session]) -> tuple[Tenant, Tenant]:
    """Two new projects, each with a key."""
    with sessions.begin() as session:
        return make_tenant(session, "Acme Corp"), make_tenant(session, "Stranger")


@pytest.fixture
def tenant(tenants: tuple[Tenant, Tenant]) -> Tenant:
    """The first of them."""
    return tenants[0]


@pytest.fixture(scope="session")
def live_service(
    database_url: str,
    database: Engine,
    sessions: sessionmaker[Session],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """The api and a scripted engine, each in its own uvicorn."""
    engine = ScriptedEngine()
    queue = RecordingQueue()
    with serve(engine.app()) as engine_url:
        settings = Settings(
            _env_file=None,
            home=tmp_path_factory.mktemp("home"),
            database_url=database_url,
            base_models={"tiny": "path:/nowhere", "org/slashed": "path:/nowhere"},
            engine_token=TOKEN,
            max_upload_bytes=1_000_000,
            max_part_bytes=200_000,
            max_json_bytes=200_000,
            max_inline_adapter_bytes=100_000,
            engine_max_rows=4,
            max_adapter_bytes=200_000,
            webhook_allow_private=True,
        )
        for base_model in ("tiny", "org/slashed"):
            register_engine(sessions, engine_url, base_model=base_model)
        nobody = Tenant(project_id="", slug="", key="")
        with serve(create_app(settings, queue=queue)) as url:
            yield Service(
                url=url,
                settings=settings,
                database=database,
                sessions=sessions,
                queue=queue,
                engine=engine,
                tenant=nobody,
                stranger=nobody,
            )


@pytest.fixture
def service(live_service: Service, tenants: tuple[Tenant, Tenant]) -> Iterator[Service]:
    """The live api with new projects, no messages, no stored files and an engine that says hello."""
    live_service.engine.reset()
    live_service.queue.reset()
    for path in live_service.settings.storage_dir.iterdir():
        path.unlink()
    service = replace(live_service, tenant=tenants[0], stranger=tenants[1], _open=[])
    yield service
    service.close()


@pytest.fixture
def client(service: Service) -> OpenAI:
    """The official client with the first project's key."""
    return service.client()
