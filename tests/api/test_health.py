"""Liveness and readiness."""

from __future__ import annotations

from datetime import timedelta

import httpx
from sqlalchemy import update

from api.database import now
from api.engines.models import EngineReplica
from api.main import create_app
from api.settings import Settings
from tests.api.support import Service, serve, wait_until


def test_all_parts_answer(service: Service) -> None:
    with httpx.Client(base_url=service.url) as http:  # no key
        assert http.get("/healthz").json() == {"status": "alive"}
        ready = http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert ready.json()["checks"]["engines"] == {"status": "ok", "detail": "tiny: 1 live, org/slashed: 1 live"}
    assert ready.json()["checks"]["database"]["status"] == "ok"


def test_no_engine_is_live(service: Service) -> None:
    heartbeat = update(EngineReplica).returning(EngineReplica.id)
    with service.sessions.begin() as session:
        session.execute(heartbeat.values(heartbeat_at=now() - timedelta(minutes=1)))
    try:
        with httpx.Client(base_url=service.url) as http:
            wait_until(lambda: http.get("/readyz").status_code == 503)
            assert http.get("/healthz").status_code == 200
            checks = http.get("/readyz").json()["checks"]
        assert (checks["engines"]["status"], checks["database"]["status"]) == ("unavailable", "ok")
        assert checks["engines"]["detail"] == "tiny: 0 live, org/slashed: 0 live"
    finally:
        with service.sessions.begin() as session:
            session.execute(heartbeat.values(heartbeat_at=now() + timedelta(days=1)))
        wait_until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)


def test_neither_database_nor_engine(tmp_path: object) -> None:
    """The app starts all the same: what it needs may come later."""
    settings = Settings(_env_file=None, home=str(tmp_path), engine_token="x")
    with serve(create_app(settings)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/healthz").status_code == 200
        ready = http.get("/readyz")
    assert ready.status_code == 503
    assert {check["status"] for check in ready.json()["checks"].values()} == {"unavailable"}
