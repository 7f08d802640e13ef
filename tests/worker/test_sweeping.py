"""Jobs that nobody looks after."""

from __future__ import annotations

from datetime import timedelta

import pytest

from api.database import now
from api.jobs.models import ENDED, JobStatus
from api.queue import TaskName
from tests.worker.support import Service
from worker.lease import claim, renew
from worker.sweeping import MAX_RINGS, sweep

EXPIRED = timedelta(seconds=-1)
LONG_AGO = timedelta(minutes=5)


def test_rings_for_what_waits(any_service: Service) -> None:
    stale = any_service.add_job(status=JobStatus.VALIDATING_FILES, created_at=now() - LONG_AGO)
    queued = any_service.add_job()
    lost = any_service.add_job()
    any_service.claim(lost, ttl=EXPIRED)

    sweep(any_service.resources())

    assert any_service.queue.sent == [
        (TaskName.VALIDATE, stale),
        (TaskName.TRAIN, queued),
        (TaskName.TRAIN, lost),
    ]


def test_leaves_alone_what_somebody_works_on(any_service: Service) -> None:
    any_service.add_job(status=JobStatus.VALIDATING_FILES)  # its first message is on its way
    any_service.claim(any_service.add_job())
    for status in ENDED:
        any_service.add_job(status=status, created_at=now() - LONG_AGO)

    sweep(any_service.resources())

    assert any_service.queue.sent == []


def test_adds_no_messages_to_those_that_wait(service: Service) -> None:
    for _ in range(3):
        service.add_job()
    for _ in range(5):
        sweep(service.resources())
    assert len(service.queue.sent) == 3

    service.queue.take()
    sweep(service.resources())
    assert len(service.queue.sent) == 3


def test_rings_in_portions(service: Service) -> None:
    jobs = [service.add_job() for _ in range(MAX_RINGS + 1)]

    sweep(service.resources())

    assert [job_id for _, job_id in service.queue.sent] == jobs[:MAX_RINGS]


def test_fails_a_job_that_loses_every_trainer(any_service: Service) -> None:
    job_id = any_service.add_job()
    for attempt in range(1, 4):
        any_service.claim(job_id, ttl=EXPIRED)
        sweep(any_service.resources(max_attempts=3))
        assert any_service.job(job_id).status == ("failed" if attempt == 3 else "running")

    job = any_service.job(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["param"], job.lost_trainers) == ("trainer_lost", None, 3)
    assert "vanished" in job.error["message"]
    assert job.finished_at is not None
    assert (job.lease_owner, job.lease_until) == (None, None)
    (message,) = any_service.messages(job_id)
    assert message == f"The job failed: {job.error['message']}"


def test_finishes_a_cancel_that_no_trainer_saw(any_service: Service) -> None:
    job_id = any_service.add_job()
    any_service.claim(job_id, ttl=EXPIRED)
    any_service.update(job_id, cancel_requested=True)

    sweep(any_service.resources())

    assert any_service.job(job_id).status == "cancelled"
    assert any_service.messages(job_id) == ["Cancelled"]
    assert any_service.queue.sent == []
    assert claim(any_service.sessions, job_id, owner="two", ttl=LONG_AGO) is None


def test_a_trainer_that_comes_back_late_stops(any_service: Service) -> None:
    lease = any_service.claim(any_service.add_job(), ttl=EXPIRED)
    sweep(any_service.resources(max_attempts=1))

    assert not renew(any_service.sessions, lease, ttl=LONG_AGO).ours
    assert any_service.job(lease.job_id).status == "failed"


@pytest.mark.parametrize("cancel_requested", [False, True])
def test_a_live_lease_is_not_ended(any_service: Service, cancel_requested: bool) -> None:
    lease = any_service.claim(any_service.add_job())
    any_service.update(lease.job_id, cancel_requested=cancel_requested, lost_trainers=99)

    sweep(any_service.resources())

    assert any_service.job(lease.job_id).status == "running"
