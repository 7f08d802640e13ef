"""Webhook endpoints through the official client."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from api.database import now
from api.jobs.models import JobStatus
from api.jobs.repository import move_job
from api.queue import TaskName
from api.webhooks.models import EventType, WebhookEndpoint
from api.webhooks.sending import is_public
from api.webhooks.service import MAX_ENDPOINTS
from tests.api.rows import add_job
from tests.api.support import Service
from tests.receiver import Receiver, receiving, unwrap

ALL: Any = list(EventType)
URL = "https://example.com/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_an_endpoint_from_creation_to_deletion(service: Service, client: OpenAI) -> None:
    made = client.webhooks.create(name="ours", url=URL, event_types=ALL)
    assert (made.object, made.name, made.url, made.event_types) == ("webhook_endpoint", "ours", URL, ALL)
    assert made.signing_secret.startswith("whsec_")
    found = client.webhooks.retrieve(made.id)
    assert found.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    assert made.signing_secret not in found.model_dump_json()
    assert found.model_extra == {"enabled": True, "disabled_reason": None, "failing_since": None}

    changed = client.webhooks.update(made.id, name="renamed", event_types=ALL[:1])
    assert (changed.name, changed.url, changed.event_types) == ("renamed", URL, ALL[:1])
    second = client.webhooks.create(name="second", url=URL, event_types=ALL)
    assert [endpoint.id for endpoint in client.webhooks.list(limit=1)] == [second.id, made.id]
    assert list(service.client(service.stranger).webhooks.list()) == []

    deleted = client.webhooks.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "webhook_endpoint.deleted", True)
    with pytest.raises(openai.NotFoundError) as caught:
        client.webhooks.retrieve(made.id)
    assert caught.value.code == "webhook_endpoint_not_found"


def test_the_events_are_those_of_jobs(client: OpenAI) -> None:
    assert client.webhooks.event_types.list().data == [
        "fine_tuning.job.succeeded",
        "fine_tuning.job.failed",
        "fine_tuning.job.cancelled",
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.create(name="x", url=URL, event_types=["fine_tuning.job.failed", "batch.completed"])
    assert caught.value.param == "event_types[1]"
    assert "fine_tuning.job.succeeded" in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https://user:password@example.com/",
        "https:///path",
        "example.com",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://10.1.2.3/",
        "https://[::1]/",
        "https://[fd00::1]/",
        "https://[::ffff:192.168.0.1]/",
        "https://example.com/" + "x" * 2048,
    ],
)
def test_a_url_that_may_not_be_reached(
    service: Service, client: OpenAI, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(service.settings, "webhook_allow_private", False)
    made = client.webhooks.create(name="x", url=URL, event_types=ALL)
    for call in (
        lambda: client.webhooks.create(name="x", url=url, event_types=ALL),
        lambda: client.webhooks.update(made.id, url=url),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param == "url"


@given(st.ip_addresses(v=4))
def test_no_way_of_writing_an_address_makes_it_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for wrapped in (
        ipaddress.IPv6Address((0xFFFF << 32) | number),  # mapped
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80)),  # 6to4
        ipaddress.IPv6Address((0x64FF9B << 96) | number),  # NAT64
    ):
        assert is_public(address) or not is_public(wrapped)


def test_a_name_of_the_machine_itself_is_refused_when_it_is_looked_up(
    service: Service, client: OpenAI, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client.webhooks.create(name="x", url=receiver.url.replace("127.0.0.1", "localhost"), event_types=ALL)
    monkeypatch.setattr(service.settings, "webhook_allow_private", False)
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert caught.value.code == "webhook_unreachable"
    assert "not on the public internet" in caught.value.message
    assert receiver.received == []


def test_a_sample_is_sent_at_once(client: OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="x", url=receiver.url, event_types=ALL)
    receiver.statuses = [418]
    for status in (418, 204):
        tested = client.webhooks.test(made.id, event_type="fine_tuning.job.succeeded")
        assert (tested.status_code, tested.success, tested.webhook_endpoint_id) == (status, True, made.id)
    assert unwrap(receiver.received[0], made.signing_secret)["type"] == "fine_tuning.job.succeeded"
    assert client.webhooks.retrieve(made.id).updated_at == made.updated_at


def test_an_old_secret_signs_for_a_day_if_it_is_kept(service: Service, client: OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="x", url=receiver.url, event_types=ALL)
    kept = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    for secret in (made.signing_secret, kept.signing_secret):
        unwrap(receiver.received[-1], secret)

    with service.sessions.begin() as session:
        session.query(WebhookEndpoint).filter_by(id=made.id).update({"old_secret_until": now() - timedelta(seconds=1)})
    client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert not accepts(receiver, made.signing_secret)
    assert accepts(receiver, kept.signing_secret)

    new = client.webhooks.rotate_secret(made.id)
    client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert not accepts(receiver, kept.signing_secret)
    assert accepts(receiver, new.signing_secret)


def accepts(receiver: Receiver, secret: str) -> bool:
    try:
        unwrap(receiver.received[-1], secret)
    except openai.InvalidWebhookSignatureError:
        return False
    return True


def test_the_log_of_deliveries(service: Service, client: OpenAI) -> None:
    made = client.webhooks.create(name="x", url=URL, event_types=ALL)
    with service.sessions.begin() as session:
        job_id = add_job(session, service.tenant, status=JobStatus.QUEUED).id
    client.fine_tuning.jobs.cancel(job_id)
    with service.sessions.begin() as session:
        other = add_job(session, service.tenant, status=JobStatus.RUNNING).id
        assert move_job(session, other, source=JobStatus.RUNNING, target=JobStatus.FAILED)
    log = service.http().get(f"/v1/webhook_endpoints/{made.id}/deliveries").json()
    assert [(row["job_id"], row["event_type"], row["status"]) for row in log["data"]] == [
        (other, "fine_tuning.job.failed", "pending"),
        (job_id, "fine_tuning.job.cancelled", "pending"),
    ]
    assert (log["object"], log["has_more"], log["data"][0]["attempts"]) == ("list", False, [])
    assert service.queue.messages == [(TaskName.DELIVER, log["data"][1]["id"])]


def test_an_endpoint_that_was_disabled_has_another_chance(service: Service, client: OpenAI) -> None:
    made = client.webhooks.create(name="x", url=URL, event_types=ALL)
    http = service.http()

    def change(**values: object) -> dict[str, Any]:
        answer = http.post(f"/v1/webhook_endpoints/{made.id}", json=values)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    off = change(enabled=False)
    assert (off["enabled"], off["disabled_reason"]) == (False, "Disabled by its user.")
    assert change(name="renamed")["enabled"] is False
    assert change(enabled=True)["enabled"] is True
    change(enabled=False)
    assert change(url=URL + "2")["enabled"] is True


def test_a_project_has_so_many_endpoints(client: OpenAI) -> None:
    for _ in range(MAX_ENDPOINTS):
        client.webhooks.create(name="x", url=URL, event_types=ALL)
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.create(name="x", url=URL, event_types=ALL)
    assert caught.value.code == "too_many_webhook_endpoints"
