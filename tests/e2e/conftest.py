"""The running service, once on SQLite and the embedded broker, once on PostgreSQL and Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from tests.api.support import empty_database, postgres_refusal
from tests.e2e.support import Running, service
from tests.tiny import make_tiny_llama


def redis_refusal() -> str | None:
    """Why Redis cannot be used; None if it can."""
    try:
        redis.Redis(host="127.0.0.1", socket_connect_timeout=3).ping()
    except redis.RedisError as error:
        return f"NOT TESTED on Redis: 127.0.0.1:6379 does not answer ({error})"
    return None


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"tiny": f"path:{make_tiny_llama(tmp_path_factory.mktemp('model') / 'tiny', max_tokens=512)}"}


@pytest.fixture(scope="session", params=["embedded", pytest.param("servers", marks=pytest.mark.postgres)])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_models: dict[str, str]
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("service")
    options = {"UORA_CACHE_DIR": str(home / "cache"), "UORA_DTYPE": "float32", "UORA_TORCH_THREADS": "1"}
    options |= {"UORA_SWEEP_INTERVAL": "PT1S", "UORA_LEASE_TTL": "PT4S", "UORA_HEARTBEAT_INTERVAL": "PT0.5S"}
    if request.param == "embedded":
        with service(home, base_models, **options) as found:
            yield found
        return
    refusal = postgres_refusal() or redis_refusal()
    if refusal:
        pytest.skip(refusal)
    broker = redis.Redis(host="127.0.0.1", db=13)
    assert broker.dbsize() == 0, "Redis database 13 is in use; the test needs an empty one"
    with empty_database("postgresql", home) as url:
        try:
            options |= {"UORA_DATABASE_URL": url, "UORA_BROKER_URL": "redis://127.0.0.1:6379/13"}
            with service(home, base_models, **options) as found:
                yield found
        finally:
            broker.flushdb()
