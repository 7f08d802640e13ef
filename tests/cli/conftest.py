"""The command line against the live api, on SQLite: it knows the service by HTTP alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from tests.api.fixtures import (  # noqa: F401 - pytest finds fixtures by their names here
    client,
    database,
    live_service,
    service,
    sessions,
    tenant,
    tenants,
)
from tests.api.support import Service, empty_database, migrate

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A migrated database."""
    with empty_database("sqlite", tmp_path_factory.mktemp("database")) as url:
        migrate(url)
        yield url


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's empty configuration, and an environment that says nothing."""
    for name in ("UORA_BASE_URL", "UORA_API_KEY", "UORA_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "uora" / "profiles.json"


@pytest.fixture
def bare(config: Path) -> Run:
    """Run a command of somebody who has not logged in."""

    def run(*arguments: str, **options: str) -> Result:
        return CliRunner().invoke(app, list(arguments), **options)

    return run


@pytest.fixture
def uora(bare: Run, service: Service, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: F811 - the fixture
    """Run a command with the key of the first project."""
    monkeypatch.setenv("UORA_BASE_URL", service.url)
    monkeypatch.setenv("UORA_API_KEY", service.tenant.key)
    return bare
