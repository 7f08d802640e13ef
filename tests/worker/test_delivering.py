"""Webhooks: every end of a job is in the outbox, and what is in the outbox arrives."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from openai import InvalidWebhookSignatureError
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import now
from api.jobs import service as jobs
from api.jobs.models import ENDED, JobStatus
from api.jobs.repository import move_job
from api.queue import CeleryQueue, TaskName
from api.unit_of_work import open_unit_of_work
from api.webhooks import service as webhooks
from api.webhooks.models import EVENT_OF_END, EventType, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from api.webhooks.repository import claim as claim_delivery
from api.webhooks.schemas import EndpointCreate
from api.webhooks.sending import Message, Sent, new_secret, send
from tests.receiver import Receiver, receiving, unwrap
from tests.worker.artifacts import make_artifact
from tests.worker.support import Service, wait_until
from worker import failures, results, validation
from worker.delivering import HOLD, deliver, ring
from worker.messages import Done
from worker.results import Finished
from worker.sweeping import sweep

ROOT = Path(__file__).parents[2]
EXPIRED = timedelta(seconds=-1)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def caller_of(service: Service) -> Caller:
    return Caller(project_id=service.project.id, project_slug=service.project.slug, key_id="key_x")


def add_endpoint(service: Service, url: str, *event_types: EventType) -> WebhookEndpoint:
    body = EndpointCreate(name="ours", url=url, event_types=list(event_types or EventType))
    with service.sessions.begin() as session:
        return webhooks.create(session, caller_of(service), body=body, allow_private=True)


def outbox(service: Service) -> list[WebhookDelivery]:
    with service.sessions() as session:
        return list(session.query(WebhookDelivery).order_by(WebhookDelivery.seq))


def attempts(service: Service) -> list[WebhookAttempt]:
    with service.sessions() as session:
        return list(session.query(WebhookAttempt).order_by(WebhookAttempt.seq))


def endpoint_of(service: Service) -> WebhookEndpoint:
    with service.sessions() as session:
        return session.query(WebhookEndpoint).one()


def set_due(service: Service, *, at: datetime | None = None) -> None:
    with service.sessions.begin() as session:
        session.query(WebhookDelivery).filter_by(status="pending").update({"next_attempt_at": at or now()})


def done() -> Finished:
    report = Done(file="a", trained_tokens=9, steps=4, hits=0, metrics={}, stopped_early=False)
    return Finished(done=report, artifact=make_artifact())


def cancel_by_user(service: Service, status: JobStatus) -> str:
    job_id = service.add_job(status=status)
    with open_unit_of_work(service.sessions, service.queue) as work:
        jobs.cancel(work, caller_of(service), job_id)
    return job_id


def succeed(service: Service) -> str:
    job_id = service.add_job()
    results.succeed(service.sessions, service.claim(job_id), done(), storage=service.storage)
    return job_id


def succeed_though_cancelled(service: Service) -> str:
    job_id = service.add_job()
    lease = service.claim(job_id)
    service.update(job_id, cancel_requested=True)
    results.succeed(service.sessions, lease, done(), storage=service.storage)
    return job_id


def fail(service: Service) -> str:
    job_id = service.add_job()
    results.fail(service.sessions, service.claim(job_id), failures.INTERNAL)
    return job_id


def cancel_in_training(service: Service) -> str:
    job_id = service.add_job()
    results.cancel(service.sessions, service.claim(job_id))
    return job_id


def interrupt_though_cancelled(service: Service) -> str:
    job_id = service.add_job()
    lease = service.claim(job_id)
    service.update(job_id, cancel_requested=True)
    results.interrupt(service.sessions, lease)
    return job_id


def lose_the_last_trainer(service: Service) -> str:
    job_id = service.add_job(lost_trainers=2)
    service.claim(job_id, ttl=EXPIRED)
    sweep(service.resources())
    return job_id


def lose_the_trainer_of_a_cancelled(service: Service) -> str:
    job_id = service.add_job()
    service.claim(job_id, ttl=EXPIRED)
    service.update(job_id, cancel_requested=True)
    sweep(service.resources())
    return job_id


def fail_in_validation(service: Service) -> str:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES)
    with pytest.MonkeyPatch.context() as patch:  # what finds the fault would load torch
        patch.setattr(validation, "_check", lambda *_: 1 / 0)
        validation.validate(service.resources(), job_id)
    return job_id


WAYS: list[tuple[Callable[[Service], str], EventType]] = [
    (succeed, EventType.SUCCEEDED),
    (succeed_though_cancelled, EventType.CANCELLED),
    (fail, EventType.FAILED),
    (cancel_in_training, EventType.CANCELLED),
    (interrupt_though_cancelled, EventType.CANCELLED),
    (lose_the_last_trainer, EventType.FAILED),
    (lose_the_trainer_of_a_cancelled, EventType.CANCELLED),
    (fail_in_validation, EventType.FAILED),
    (lambda service: cancel_by_user(service, JobStatus.VALIDATING_FILES), EventType.CANCELLED),
    (lambda service: cancel_by_user(service, JobStatus.QUEUED), EventType.CANCELLED),
    (lambda service: cancel_by_user(service, JobStatus.PAUSED), EventType.CANCELLED),
]


class TestOutbox:
    @pytest.mark.parametrize(("end", "event_type"), WAYS)
    def test_every_way_of_ending_is_told_once(
        self, any_service: Service, end: Callable[[Service], str], event_type: EventType
    ) -> None:
        endpoint = add_endpoint(any_service, "http://127.0.0.1:9/")
        job_id = end(any_service)

        (delivery,) = outbox(any_service)
        assert (delivery.job_id, delivery.event_type, delivery.status) == (job_id, event_type, "pending")
        assert (delivery.endpoint_id, delivery.project_id) == (endpoint.id, any_service.project.id)
        assert EVENT_OF_END[JobStatus(any_service.job(job_id).status)] == event_type
        assert any_service.job(job_id).finished_at is not None

    def test_no_other_code_ends_a_job(self) -> None:
        """A status that is assigned, or set by a statement, goes past the outbox; a claim ends nothing."""
        found = []
        for path in [*(ROOT / "worker").rglob("*.py"), *(ROOT / "api" / "jobs").glob("*.py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                targets = node.targets if isinstance(node, ast.Assign) else []
                names = [ast.unparse(target) for target in targets]
                found += [f"{path.name}: {name}" for name in names if name.endswith(".status")]
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "values":
                    set_to = [ast.unparse(each.value) for each in node.keywords if each.arg == "status"]
                    found += [f"{path.name}: {value}" for value in set_to]
        of_uploads = "tidying.py: upload.status"
        assert sorted(found) == ["lease.py: JobStatus.RUNNING", "repository.py: target", of_uploads]
        assert EVENT_OF_END.keys() == ENDED

    def test_an_end_that_is_not_committed_is_not_told(
        self, any_service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_endpoint(any_service, "http://127.0.0.1:9/")
        job_id = any_service.add_job()
        lease = any_service.claim(job_id)

        def break_down(*_: object) -> None:
            raise RuntimeError("after the end, before the commit")

        monkeypatch.setattr(results, "_add_result_file", break_down)
        with pytest.raises(RuntimeError, match="before the commit"):
            results.succeed(any_service.sessions, lease, done(), storage=any_service.storage)
        assert outbox(any_service) == []
        assert any_service.job(job_id).status == JobStatus.RUNNING

    def test_a_pause_is_no_end(self, service: Service) -> None:
        add_endpoint(service, "http://127.0.0.1:9/")
        job_id = service.add_job()
        lease = service.claim(job_id)
        service.update(job_id, pause_requested=True)
        results.interrupt(service.sessions, lease)
        assert (service.job(job_id).status, outbox(service)) == (JobStatus.PAUSED, [])

    def test_only_who_asked_is_told(self, service: Service) -> None:
        add_endpoint(service, "http://127.0.0.1:9/", EventType.FAILED)
        wanted = add_endpoint(service, "http://127.0.0.1:9/", EventType.SUCCEEDED, EventType.CANCELLED)
        disabled = add_endpoint(service, "http://127.0.0.1:9/")
        with service.sessions.begin() as session:
            session.query(WebhookEndpoint).filter_by(id=disabled.id).update({"disabled_at": now()})
        succeed(service)
        assert [delivery.endpoint_id for delivery in outbox(service)] == [wanted.id]

    def test_a_job_that_ends_twice_is_told_twice(self, service: Service) -> None:
        add_endpoint(service, "http://127.0.0.1:9/")
        job_id = fail(service)
        service.update(job_id, status=JobStatus.QUEUED, finished_at=None)
        results.succeed(service.sessions, service.claim(job_id), done(), storage=service.storage)
        assert [delivery.event_type for delivery in outbox(service)] == [EventType.FAILED, EventType.SUCCEEDED]
        assert len({delivery.event_id for delivery in outbox(service)}) == 2


class TestDelivery:
    def test_what_arrives_is_what_the_client_unwraps(self, any_service: Service, receiver: Receiver) -> None:
        endpoint = add_endpoint(any_service, receiver.url)
        job_id = succeed(any_service)
        (before,) = outbox(any_service)
        deliver(any_service.resources(webhook_allow_private=True), before.id)

        (received,) = receiver.received
        event = unwrap(received, endpoint.secret)
        assert event == {
            "id": before.event_id,
            "object": "event",
            "created_at": int(before.created_at.timestamp()),
            "type": "fine_tuning.job.succeeded",
            "data": {"id": job_id},
        }
        assert received.id == before.id
        with pytest.raises(InvalidWebhookSignatureError):
            unwrap(received, new_secret())
        (after,) = outbox(any_service)
        assert (after.status, after.attempts, after.next_attempt_at) == ("delivered", 1, None)
        (attempt,) = attempts(any_service)
        assert (attempt.number, attempt.status_code, attempt.error) == (1, 204, None)

    def test_a_receiver_that_fails_and_comes_back(self, any_service: Service, receiver: Receiver) -> None:
        held = any_service.resources(webhook_allow_private=True)
        endpoint = add_endpoint(any_service, receiver.url)
        receiver.statuses = [500, 302]
        succeed(any_service)
        (delivery,) = outbox(any_service)
        for number in (1, 2, 3):
            deliver(held, delivery.id)
            deliver(held, delivery.id)  # a repeated message: it is not due
            assert len(receiver.received) == number
            set_due(any_service)

        assert {received.id for received in receiver.received} == {delivery.id}
        assert len({received.body for received in receiver.received}) == 1
        for received in receiver.received:
            unwrap(received, endpoint.secret)
        assert [attempt.status_code for attempt in attempts(any_service)] == [500, 302, 204]
        assert outbox(any_service)[0].status == "delivered"
        assert endpoint_of(any_service).failing_since is None

    def test_the_sweeper_rings_for_what_is_due(self, any_service: Service) -> None:
        add_endpoint(any_service, "http://127.0.0.1:9/")
        succeed(any_service)
        held = any_service.resources()
        (delivery,) = outbox(any_service)
        sweep(held)
        assert any_service.queue.take() == [(TaskName.DELIVER, delivery.id)]
        set_due(any_service, at=now() + timedelta(seconds=30))
        sweep(held)
        assert any_service.queue.take() == []

    def test_the_trainer_rings_at_once(self, service: Service) -> None:
        add_endpoint(service, "http://127.0.0.1:9/")
        job_id = succeed(service)
        ring(service.resources(), job_id)
        assert service.queue.take() == [(TaskName.DELIVER, outbox(service)[0].id)]

    def test_a_cancellation_rings_after_its_commit(self, service: Service) -> None:
        add_endpoint(service, "http://127.0.0.1:9/")
        cancel_by_user(service, JobStatus.QUEUED)
        assert service.queue.take() == [(TaskName.DELIVER, outbox(service)[0].id)]

    def test_attempts_are_further_and_further_apart_for_three_days(self) -> None:
        delays = [webhooks.delay_after(number) for number in range(1, 40)]
        bare = [timedelta(seconds=10 * 2**power) for power in range(11)] + [timedelta(hours=4)] * 28
        for delay, least in zip(delays, bare, strict=True):
            assert least <= delay <= least * 1.2
        assert timedelta(hours=1) < sum(delays[:9], timedelta()) < timedelta(hours=2)

    def test_an_endpoint_that_fails_for_three_days_is_disabled(self, any_service: Service, receiver: Receiver) -> None:
        add_endpoint(any_service, receiver.url)
        receiver.statuses = [503, 503]
        succeed(any_service)
        succeed(any_service)
        first, second = outbox(any_service)
        held = any_service.resources(webhook_allow_private=True)
        deliver(held, first.id)
        assert endpoint_of(any_service).disabled_at is None
        long_ago = now() - webhooks.PATIENCE
        with any_service.sessions.begin() as session:
            session.query(WebhookEndpoint).update({"failing_since": long_ago})
            session.query(WebhookDelivery).filter_by(id=first.id).update({"created_at": long_ago})
        set_due(any_service)
        deliver(held, first.id)

        endpoint = endpoint_of(any_service)
        assert endpoint.disabled_at is not None
        assert f"since {long_ago:%Y-%m-%d %H:%M} UTC failed" in str(endpoint.disabled_reason)
        assert "status 503" in str(endpoint.disabled_reason)
        assert [delivery.status for delivery in outbox(any_service)] == ["failed", "failed"]
        deliver(held, second.id)
        assert len(receiver.received) == 2

    def test_a_result_that_comes_too_late_counts_for_nothing(self, any_service: Service) -> None:
        add_endpoint(any_service, "http://127.0.0.1:9/")
        succeed(any_service)
        (delivery,) = outbox(any_service)
        with any_service.sessions.begin() as session:
            slow = claim_delivery(session, delivery.id, hold=timedelta(0))
        with any_service.sessions.begin() as session:
            fast = claim_delivery(session, delivery.id, hold=HOLD)
            assert claim_delivery(session, delivery.id, hold=HOLD) is None
        assert slow is not None
        assert fast is not None
        for claimed, sent in ((fast, Sent(200, None, 5)), (slow, Sent(None, "late", 5))):
            with any_service.sessions.begin() as session:
                webhooks.record(session, claimed, sent)
        assert outbox(any_service)[0].status == "delivered"
        assert [attempt.number for attempt in attempts(any_service)] == [2]

    def test_an_endpoint_that_is_deleted_takes_its_deliveries_along(
        self, any_service: Service, receiver: Receiver
    ) -> None:
        endpoint = add_endpoint(any_service, receiver.url)
        succeed(any_service)
        (delivery,) = outbox(any_service)
        with any_service.sessions.begin() as session:
            claimed = claim_delivery(session, delivery.id, hold=HOLD)
        with any_service.sessions.begin() as session:
            webhooks.delete(session, caller_of(any_service), endpoint.id)
        assert claimed is not None
        with any_service.sessions.begin() as session:
            webhooks.record(session, claimed, Sent(200, None, 5))
        assert (outbox(any_service), attempts(any_service)) == ([], [])

    def test_a_deletion_does_not_undo_the_end_of_a_job(self, any_service: Service) -> None:
        """It comes between the look for endpoints and the delivery's insertion."""
        if any_service.engine.dialect.name == "sqlite":
            pytest.skip("on SQLite the transaction that ends the job keeps every other writer out")
        endpoint = add_endpoint(any_service, "http://127.0.0.1:9/")
        job_id = any_service.add_job()

        def delete_endpoint() -> None:
            with any_service.sessions.begin() as session:
                webhooks.delete(session, caller_of(any_service), endpoint.id)

        deletion = threading.Thread(target=delete_endpoint)

        def waits() -> bool:
            waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :part")
            with any_service.engine.connect() as connection:
                return bool(connection.scalar(waiting, {"part": "%webhook_endpoints%"}))

        with any_service.sessions.begin() as session:

            @event.listens_for(session, "before_flush")
            def _delete(flushed: Session, *_: object) -> None:
                if any(isinstance(row, WebhookDelivery) for row in flushed.new) and not deletion.ident:
                    deletion.start()
                    wait_until(lambda: waits() or not deletion.is_alive(), what="the deletion waits, or is done")

            assert move_job(session, job_id, source=JobStatus.QUEUED, target=JobStatus.CANCELLED)
        deletion.join()
        assert any_service.job(job_id).status == JobStatus.CANCELLED
        assert outbox(any_service) == []

    def test_old_deliveries_are_forgotten(self, service: Service, receiver: Receiver) -> None:
        add_endpoint(service, receiver.url)
        for _ in range(3):
            succeed(service)
        old, recent, pending = outbox(service)
        held = service.resources(webhook_allow_private=True)
        deliver(held, old.id)
        deliver(held, recent.id)
        with service.sessions.begin() as session:
            aged = session.query(WebhookDelivery).filter(WebhookDelivery.id.in_([old.id, pending.id]))
            aged.update({"created_at": now() - timedelta(days=31)})
        sweep(held)
        assert [delivery.id for delivery in outbox(service)] == [recent.id, pending.id]


CRASHING = """
import sys
from api.settings import Settings
from worker import context
from worker.delivering import deliver
settings = Settings(_env_file=None, home=sys.argv[1], engine_token="x", webhook_allow_private=True)
deliver(context.build(settings), sys.argv[2])
"""


def test_a_worker_that_is_killed_in_between(service: Service, receiver: Receiver) -> None:
    """The receiver has it, and nobody wrote that down: it gets it again, under the same id."""
    endpoint = add_endpoint(service, receiver.url)
    succeed(service)
    (delivery,) = outbox(service)
    receiver.answering.clear()
    command = [sys.executable, "-c", CRASHING, str(service.settings.home), delivery.id]
    worker = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_until(lambda: receiver.received, what="the first attempt arrived")
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    receiver.answering.set()

    (after,) = outbox(service)
    assert (after.status, after.attempts, attempts(service)) == ("pending", 1, [])
    assert after.next_attempt_at is not None
    assert now() < after.next_attempt_at <= now() + HOLD
    held = service.resources(webhook_allow_private=True)
    sweep(held)
    assert service.queue.take() == []  # the attempt may still be under way
    set_due(service)
    sweep(held)
    assert service.queue.take() == [(TaskName.DELIVER, delivery.id)]
    deliver(held, delivery.id)

    assert [received.id for received in receiver.received] == [delivery.id, delivery.id]
    unwrap(receiver.received[1], endpoint.secret)
    assert outbox(service)[0].status == "delivered"
    assert [attempt.number for attempt in attempts(service)] == [2]


def test_a_message_of_the_queue_is_enough(service: Service, receiver: Receiver, tmp_path: Path) -> None:
    """The Procfile's own command."""
    add_endpoint(service, receiver.url)
    succeed(service)
    (line,) = [line for line in (ROOT / "Procfile").read_text().splitlines() if line.startswith("webhooks: ")]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "UORA_HOME": str(service.settings.home),
        "UORA_ENGINE_TOKEN": "x",
        "UORA_WEBHOOK_ALLOW_PRIVATE": "true",
    }
    command = [sys.executable, "-m", *line.removeprefix("webhooks: ").split()]
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            CeleryQueue(service.settings).send(TaskName.DELIVER, outbox(service)[0].id)
            wait_until(lambda: outbox(service)[0].status == "delivered", what="the delivery is made")
        finally:
            worker.terminate()
            worker.wait(timeout=30)
    assert len(receiver.received) == 1


class TestSending:
    def send(self, url: str, *, timeout: float = 15, allow_private: bool = True) -> Sent:
        message = Message("wh_x", url, b"{}", [new_secret()])
        return asyncio.run(send(message, allow_private=allow_private, timeout=timeout))

    def test_a_redirect_is_not_followed(self, receiver: Receiver) -> None:
        receiver.statuses = [307]
        sent = self.send(receiver.url)
        assert (sent.status_code, sent.delivered, len(receiver.received)) == (307, False, 1)

    def test_an_answer_that_does_not_come_in_time(self, receiver: Receiver) -> None:
        receiver.answering.clear()
        sent = self.send(receiver.url, timeout=0.3)
        assert (sent.status_code, sent.error) == (None, "No answer within 0.3 s.")

    def test_nobody_there(self) -> None:
        sent = self.send("http://127.0.0.1:9/")
        assert sent.status_code is None
        assert str(sent.error).startswith("ConnectError")
        for host in ("no-such-host.invalid", "a" * 70 + ".invalid", "a..b", "127.0.0.1:0"):
            sent = self.send(f"http://{host}/")
            assert sent.status_code is None
            assert sent.error

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0", "[::ffff:127.0.0.1]"])
    def test_what_is_not_public_gets_nothing(self, receiver: Receiver, host: str) -> None:
        sent = self.send(f"http://{host}:{receiver.port}/", allow_private=False)
        assert "not on the public internet" in str(sent.error)
        assert receiver.received == []

    def test_a_name_is_looked_up_once_and_that_address_is_connected_to(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever answers a second question differently does not move the connection elsewhere."""
        asked = answer_for(monkeypatch, "receiver.test", "127.0.0.1")
        sent = self.send(f"http://receiver.test:{receiver.port}/")
        assert (sent.status_code, asked) == (204, ["receiver.test"])
        assert receiver.received[0].headers["host"] == f"receiver.test:{receiver.port}"

    def test_the_certificate_must_be_the_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

        make_certificate(tmp_path, "receiver.test")
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        trust = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        monkeypatch.setattr("api.webhooks.sending._tls", lambda: trust)
        answer_for(monkeypatch, "receiver.test", "127.0.0.1")
        answer_for(monkeypatch, "other.test", "127.0.0.1")
        with receiving(server) as receiver:
            assert self.send(f"https://receiver.test:{receiver.port}/").status_code == 204
            refused = self.send(f"https://other.test:{receiver.port}/")
        assert "certificate verify failed" in str(refused.error)
        assert len(receiver.received) == 1


def answer_for(monkeypatch: pytest.MonkeyPatch, name: str, address: str) -> list[str]:
    """Let a name have an address for the event loop's look-ups; what was asked of it."""
    asked: list[str] = []
    before = asyncio.BaseEventLoop.getaddrinfo

    async def look_up(loop: asyncio.BaseEventLoop, host: str, port: int, **options: object) -> object:
        if host != name:
            return await before(loop, host, port, **options)  # type: ignore[arg-type]
        asked.append(host)
        return await before(loop, address, port, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    return asked


def make_certificate(folder: Path, name: str) -> None:
    """A certificate that signs itself, and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName=DNS:{name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
