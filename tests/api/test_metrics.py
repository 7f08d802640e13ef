"""``/metrics``: what is counted, what the database knows, and who may see it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from sqlalchemy import create_engine

from api.database import make_read_sessions, now
from api.jobs.models import JobStatus
from api.metrics.exposition import may_read
from api.metrics.service import DatabaseCollector
from api.webhooks.models import DeliveryStatus, EventType, WebhookDelivery, WebhookEndpoint
from tests.api.rows import add_job
from tests.api.support import Service
from tests.metrics import parse, read, value

LOOPBACK = "127.0.0.1"
TTL = timedelta(seconds=5)


def collector_of(service: Service) -> CollectorRegistry:
    """One that has read nothing yet."""
    registry = CollectorRegistry()
    sessions = make_read_sessions(service.database)
    registry.register(DatabaseCollector(sessions, base_models=["tiny", "unserved"], engine_ttl=TTL))
    return registry


class TestRequests:
    def test_are_counted_by_route_and_never_by_path(self, service: Service) -> None:
        http = service.http()
        before = parse(http.get("/metrics").text)
        for path in ("/v1/fine_tuning/jobs/ftjob-mine", "/v1/fine_tuning/jobs/ftjob-other", "/nothing/mine"):
            assert http.get(path).status_code == 404
        http.request("BREW", "/v1/models")
        after = parse(text := http.get("/metrics").text)

        def counted(**labels: str) -> float:
            name = "uora_request_seconds_count"
            return value(after, name, **labels) - value(before, name, **labels)

        assert counted(route="/v1/fine_tuning/jobs/{job_id}", method="GET", status="404") == 2
        assert counted(route="none", status="404") == 1
        assert counted(method="other") == 1
        assert counted(route="/metrics", method="GET", status="200") == 1
        assert "mine" not in text
        assert "BREW" not in text
        assert service.tenant.project_id not in text
        assert value(after, "process_resident_memory_bytes") > 0


class TestDatabase:
    def test_tells_what_waits_and_for_how_long(self, service: Service) -> None:
        before = read(collector_of(service))
        with service.sessions.begin() as session:
            add_job(session, service.tenant, status=JobStatus.QUEUED, created_at=now() - timedelta(days=400))
            add_job(session, service.tenant, status=JobStatus.RUNNING, lease_until=now() - timedelta(seconds=5))
            add_job(session, service.tenant, status=JobStatus.RUNNING, lease_until=now() + timedelta(hours=1))
        after = read(collector_of(service))

        def more(name: str, **labels: str) -> float:
            return value(after, name, **labels) - value(before, name, **labels)

        assert more("uora_jobs", status="queued") == 1
        assert more("uora_jobs", status="running") == 2
        assert more("uora_jobs_abandoned") == 1
        assert {labels["status"] for labels, _ in after["uora_jobs"]} == set(JobStatus)
        # The oldest is the first that was made, which is another test's where there is one.
        assert value(after, "uora_oldest_job_age_seconds", status="queued") > 0
        assert value(after, "uora_database_up") == 1

    def test_tells_which_base_models_nobody_serves(self, service: Service) -> None:
        found = read(collector_of(service))
        assert value(found, "uora_engines", base_model="tiny") == 1
        assert ({"base_model": "unserved"}, 0) in found["uora_engines"]

    def test_tells_which_webhooks_are_late(self, service: Service) -> None:
        before = read(collector_of(service))
        with service.sessions.begin() as session:
            common = {"project_id": service.tenant.project_id, "created_at": now()}
            session.add(
                WebhookEndpoint(
                    id="whe_late", name="x", url="https://x", event_types=[], secret="x", updated_at=now(), **common
                )
            )
            session.flush()
            for number, status in enumerate([DeliveryStatus.PENDING, DeliveryStatus.DELIVERED]):
                session.add(
                    WebhookDelivery(
                        id=f"wh_late{number}",
                        endpoint_id="whe_late",
                        event_id="evt",
                        event_type=EventType.FAILED,
                        job_id="ftjob-x",
                        status=status,
                        next_attempt_at=now() - timedelta(hours=2),
                        **common,
                    )
                )
        after = read(collector_of(service))
        assert value(after, "uora_webhooks_pending") - value(before, "uora_webhooks_pending") == 1
        assert value(after, "uora_webhooks_overdue_seconds") > 7000

    def test_is_asked_once_a_second_at_most(self, service: Service) -> None:
        registry = collector_of(service)
        before = read(registry)
        with service.sessions.begin() as session:
            add_job(session, service.tenant, status=JobStatus.PAUSED)
        assert value(read(registry), "uora_jobs", status="paused") == value(before, "uora_jobs", status="paused")

    def test_may_be_away(self) -> None:
        registry = CollectorRegistry()
        nowhere = make_read_sessions(create_engine("sqlite:////nowhere/at/all.db"))
        registry.register(DatabaseCollector(nowhere, base_models=["tiny"], engine_ttl=TTL))
        assert set(read(registry)) == {"uora_database_up"}
        assert value(read(registry), "uora_database_up") == 0


class TestReaders:
    @pytest.mark.parametrize(
        ("token", "client", "headers", "allowed"),
        [
            (None, LOOPBACK, {}, True),
            (None, "::1", {}, True),
            (None, "::ffff:127.0.0.1", {}, True),
            ("", LOOPBACK, {}, True),
            (None, "192.0.2.1", {}, False),
            (None, None, {}, False),
            (None, LOOPBACK, {"x-forwarded-for": "192.0.2.1"}, False),
            (None, "192.0.2.1", {"authorization": "Bearer None"}, False),
            ("", "192.0.2.1", {"authorization": "Bearer "}, False),
            ("word", LOOPBACK, {}, False),
            ("word", LOOPBACK, {"authorization": "Bearer other"}, False),
            ("word", LOOPBACK, {"authorization": "Bearer wörd"}, False),
            ("word", "192.0.2.1", {"authorization": "bearer word"}, True),
        ],
    )
    def test_have_the_token_or_are_on_the_machine(
        self, token: str | None, client: str | None, headers: dict[str, str], allowed: bool
    ) -> None:
        secret = None if token is None else SecretStr(token)
        assert may_read(secret, client=client, headers=headers) is allowed

    def test_others_are_told_what_to_do(self, service: Service) -> None:
        answer = service.http().get("/metrics", headers={"x-forwarded-for": "192.0.2.1"})
        assert answer.status_code == 401
        assert "UORA_METRICS_TOKEN" in answer.json()["error"]["message"]
