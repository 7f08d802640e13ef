"""The running service, once on SQLite and the embedded broker, once on PostgreSQL and Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import empty_broker, empty_database
from tests.e2e.support import Running, service
from tests.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"tiny": f"path:{make_tiny_llama(tmp_path_factory.mktemp('model') / 'tiny', max_tokens=512)}"}


@pytest.fixture(scope="package", params=["embedded", pytest.param("servers", marks=pytest.mark.postgres)])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_models: dict[str, str]
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("service")
    options = {"UORA_CACHE_DIR": str(home / "cache"), "UORA_DTYPE": "float32", "UORA_TORCH_THREADS": "1"}
    # A spare is tested in tests/worker; here its start would only take time from the tests beside it.
    options |= {"UORA_SPARE_TRAINER": "false"}
    options |= {"UORA_SWEEP_INTERVAL": "PT1S", "UORA_LEASE_TTL": "PT4S", "UORA_HEARTBEAT_INTERVAL": "PT0.5S"}
    if request.param == "embedded":
        with service(home, base_models, **options) as found:
            yield found
        return
    with empty_database("postgresql", home) as url, empty_broker() as broker_url:
        options |= {"UORA_DATABASE_URL": url, "UORA_BROKER_URL": broker_url}
        with service(home, base_models, **options) as found:
            yield found
