"""What Celery processes count, and where they tell it."""

from __future__ import annotations

import socket
from datetime import timedelta

import httpx
import pytest
from pydantic import SecretStr

from api.queue import TaskName
from api.settings import Settings
from tests.metrics import parse, read, value
from tests.worker.support import Service
from worker import failures, metrics
from worker.results import NOTHING
from worker.sweeping import sweep
from worker.tasks.training import _settle


def more(name: str, before: dict[str, list[tuple[dict[str, str], float]]], **labels: str) -> float:
    return value(read(metrics.REGISTRY), name, **labels) - value(before, name, **labels)


def test_a_lost_lease_is_counted_as_one(service: Service) -> None:
    held = service.resources()
    lease = service.claim(service.add_job())
    assert _settle(held, lease, failures.INTERNAL, NOTHING) == "failed"
    stale = service.claim(lost := service.add_job(), ttl=timedelta(seconds=-1))
    service.claim(lost, owner="another")
    assert _settle(held, stale, failures.INTERNAL, NOTHING) == "lease_lost"


def test_rings_of_the_sweeper_are_counted(service: Service) -> None:
    before = read(metrics.REGISTRY)
    for _ in range(3):
        service.add_job()
    sweep(service.resources())
    assert more("uora_sweeper_rings_total", before, task=TaskName.TRAIN) == 3


def test_tasks_are_counted_also_where_they_raise() -> None:
    before = read(metrics.REGISTRY)
    with metrics.timed("some.task"):
        pass
    with pytest.raises(ValueError, match="x"), metrics.timed("some.task"):
        raise ValueError("x")
    assert more("uora_task_seconds_count", before, task="some.task", outcome="done") == 1
    assert more("uora_task_seconds_count", before, task="some.task", outcome="raised") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_they_are_read_on_a_port_with_the_token(settings: Settings) -> None:
    port = free_port()
    told = settings.model_copy(update={"metrics_port": port, "metrics_token": SecretStr("word")})
    metrics.serve_metrics(told)
    url = f"http://127.0.0.1:{port}/metrics"
    assert httpx.get(url).status_code == 401
    found = parse(httpx.get(url, headers={"Authorization": "Bearer word"}).text)
    assert value(found, "process_resident_memory_bytes") > 0
    with pytest.raises(RuntimeError, match="UORA_METRICS_PORT"):
        metrics.serve_metrics(told)


def test_nothing_listens_unless_it_is_told_to(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "make_server", lambda *_, **__: pytest.fail("it listens"))
    metrics.serve_metrics(settings)
