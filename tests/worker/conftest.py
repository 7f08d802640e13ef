"""Databases, brokers and a base model for the worker's tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from api.settings import Settings
from tests.worker.support import BASE_MODEL, Service
from worker.child_process import ChildProcess

POSTGRES = "postgresql+psycopg://postgres@127.0.0.1:5432"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A database of its own on the local PostgreSQL."""
    admin = create_engine(f"{POSTGRES}/postgres", isolation_level="AUTOCOMMIT")
    name = f"uora_worker_{secrets.token_hex(4)}"
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        pytest.skip(f"NOT TESTED on PostgreSQL: none answers on 127.0.0.1:5432 ({error.orig})")
    yield f"{POSTGRES}/{name}"
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that trains in milliseconds."""
    from tests.tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("base-model"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Everything below one folder; times short enough for tests."""
    return Settings(
        _env_file=None,
        home=tmp_path / "home",
        cache_dir=tmp_path / "cache",
        engine_token=SecretStr("engine-secret"),
        base_models={BASE_MODEL: f"path:{tmp_path / 'no-model'}"},
        dtype="float32",
        torch_threads=1,
        spare_trainer=False,  # it would outlive the test
        heartbeat_interval=timedelta(seconds=0.2),
        sweep_interval=timedelta(seconds=1),
    )


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    """A service on SQLite."""
    settings.home.mkdir(parents=True)
    service = Service(settings)
    yield service
    service.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_service(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Service]:
    """A service on each database."""
    settings.home.mkdir(parents=True)
    if request.param == "postgresql":
        settings.database_url = request.getfixturevalue("postgres_url")
    service = Service(settings)
    yield service
    service.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ChildProcess]:
    """Every child, in the order of their starts."""
    children: list[ChildProcess] = []
    start = ChildProcess.start

    def remember() -> ChildProcess:
        children.append(start())
        return children[-1]

    monkeypatch.setattr(ChildProcess, "start", remember)
    return children
