"""Liveness and readiness."""

from __future__ import annotations

import httpx

from api.main import create_app
from api.settings import Settings
from tests.api.support import Service, serve


def test_all_parts_answer(service: Service) -> None:
    with httpx.Client(base_url=service.url) as http:  # no key
        assert http.get("/healthz").json() == {"status": "alive"}
        ready = http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert ready.json()["checks"]["engine"] == {"status": "ok", "detail": "serves tiny"}
    assert ready.json()["checks"]["database"]["status"] == "ok"


def test_an_engine_that_still_loads(service: Service) -> None:
    service.engine.ready = False
    with httpx.Client(base_url=service.url) as http:
        assert http.get("/healthz").status_code == 200
        ready = http.get("/readyz")
    assert ready.status_code == 503
    checks = ready.json()["checks"]
    assert (checks["engine"]["status"], checks["database"]["status"]) == ("unavailable", "ok")


def test_neither_database_nor_engine(tmp_path: object) -> None:
    """The app starts all the same: what it needs may come later."""
    settings = Settings(_env_file=None, home=str(tmp_path), engine_url="http://127.0.0.1:9", engine_token="x")
    with serve(create_app(settings)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/healthz").status_code == 200
        ready = http.get("/readyz")
    assert ready.status_code == 503
    assert {check["status"] for check in ready.json()["checks"].values()} == {"unavailable"}
