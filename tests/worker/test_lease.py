"""Who may work on a job, and who may write."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest

from api.database import now
from api.jobs.models import ENDED, Checkpoint, JobStatus, TrainingState
from api.projects.models import Project
from tests.worker.support import TTL, Service, add_adapter
from worker import results
from worker.lease import Lease, LeaseLost, claim, claim_companions, renew, writing

EXPIRED = timedelta(seconds=-1)


class TestClaim:
    def test_takes_a_queued_job(self, any_service: Service) -> None:
        job_id = any_service.add_job(progress={"step": 5})

        lease = claim(any_service.sessions, job_id, owner="one", ttl=TTL)

        assert lease == Lease(job_id=job_id, project_id=any_service.project.id, attempt=1, owner="one")
        job = any_service.job(job_id)
        assert (job.status, job.lease_owner, job.attempt, job.progress) == ("running", "one", 1, None)
        assert job.lease_until is not None
        assert job.started_at is not None
        assert now() + TTL / 2 < job.lease_until <= now() + TTL
        assert abs(job.started_at - now()) < timedelta(seconds=5)

    @pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, JobStatus.PAUSED, *sorted(ENDED)])
    def test_leaves_other_states_alone(self, service: Service, status: JobStatus) -> None:
        job_id = service.add_job(status=status)

        assert claim(service.sessions, job_id, owner="one", ttl=TTL) is None
        assert service.job(job_id).status == status

    def test_leaves_a_job_to_be_cancelled_alone(self, any_service: Service) -> None:
        job_id = any_service.add_job(cancel_requested=True)

        assert claim(any_service.sessions, job_id, owner="one", ttl=TTL) is None

    def test_leaves_a_live_lease_alone(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        any_service.claim(job_id)

        assert claim(any_service.sessions, job_id, owner="two", ttl=TTL) is None
        assert any_service.job(job_id).lease_owner == "one"

    def test_takes_over_when_the_lease_ran_out(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        any_service.claim(job_id, ttl=EXPIRED)

        lease = claim(any_service.sessions, job_id, owner="two", ttl=TTL)

        assert lease is not None
        assert lease.attempt == 2
        assert any_service.job(job_id).lost_trainers == 1

    def test_an_orderly_interruption_is_no_lost_trainer(self, service: Service) -> None:
        job_id = service.add_job()
        for attempt in range(1, 6):
            lease = claim(service.sessions, job_id, owner="one", ttl=TTL, max_attempts=1)
            assert lease is not None
            assert lease.attempt == attempt
            results.interrupt(service.sessions, lease)
        assert service.job(job_id).lost_trainers == 0

    def test_stops_after_max_attempts(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        for _ in range(3):
            assert claim(any_service.sessions, job_id, owner="one", ttl=EXPIRED, max_attempts=3)

        assert claim(any_service.sessions, job_id, owner="one", ttl=TTL, max_attempts=3) is None

    def test_leaves_a_job_to_be_paused_alone(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        any_service.claim(job_id, ttl=EXPIRED)
        any_service.update(job_id, pause_requested=True)

        assert claim(any_service.sessions, job_id, owner="two", ttl=TTL) is None

    def test_keeps_checkpoints_and_the_first_start(self, service: Service) -> None:
        job_id = service.add_job()
        lease = service.claim(job_id, ttl=EXPIRED)
        with writing(service.sessions, lease) as (session, job):
            add_adapter(session, lease, "ft:ckpt-step-1", checkpoint_step=1)
            row = Checkpoint(id="ckpt", job_id=job.id, step_number=1, model_name="ft:ckpt-step-1", metrics={})
            session.add(row)
        first_start = service.job(job_id).started_at

        service.claim(job_id, owner="two")

        assert [adapter.id for adapter in service.adapters()] == ["ft:ckpt-step-1"]
        assert [checkpoint.id for checkpoint in service.checkpoints()] == ["ckpt"]
        assert service.job(job_id).started_at == first_start

    def test_progress_goes_back_to_what_was_kept(self, any_service: Service) -> None:
        job_id = any_service.add_job(progress={"step": 37, "total_steps": 60, "train_loss": 0.5})
        lease = any_service.claim(job_id, ttl=EXPIRED)
        any_service.update(job_id, progress={"step": 37, "total_steps": 60, "train_loss": 0.5})
        with writing(any_service.sessions, lease) as (session, _):
            session.add(TrainingState(job_id=job_id, attempt=1, step=20, bytes=1, state=b"s"))

        any_service.claim(job_id, owner="two")

        assert any_service.job(job_id).progress == {"step": 20, "total_steps": 60}


class TestCompanions:
    """Who is claimed together."""

    def test_the_oldest_queued_with_the_same_key_of_any_project(self, any_service: Service) -> None:
        with any_service.sessions.begin() as session:
            session.add(Project(id="proj_other", name="Other", slug="other"))
        keyed: dict[str, Any] = {"cotraining_key": "key"}
        wanted = [any_service.add_job(**keyed), any_service.add_job(**keyed, project_id="proj_other")]
        first = any_service.claim(any_service.add_job(**keyed))
        any_service.add_job(cotraining_key="other")
        any_service.add_job(**keyed, status=JobStatus.PAUSED)
        any_service.add_job(**keyed, lost_trainers=1)
        any_service.claim(any_service.add_job(**keyed), ttl=EXPIRED)
        wanted.append(any_service.add_job(**keyed))
        rest = any_service.add_job(**keyed)

        taken = claim_companions(any_service.sessions, first, at_most=3, ttl=TTL)

        assert [lease.job_id for lease in taken] == wanted
        assert [lease.project_id for lease in taken] == [any_service.job(job_id).project_id for job_id in wanted]
        assert {any_service.job(job_id).lease_owner for job_id in wanted} == {"one"}
        assert any_service.job(rest).status == "queued"

    @pytest.mark.parametrize("values", [{"cotraining_key": None}, {"cotraining_key": "key", "lost_trainers": 1}])
    def test_a_job_that_is_to_be_alone_has_none(self, service: Service, values: dict[str, Any]) -> None:
        first = service.claim(service.add_job(**values))
        for key in (None, "key"):
            service.add_job(cotraining_key=key)

        assert claim_companions(service.sessions, first, at_most=3, ttl=TTL) == []


class TestRace:
    def test_trainers_at_once_share_no_job(self, any_service: Service) -> None:
        job_ids = [any_service.add_job(cotraining_key="key") for _ in range(16)]
        start = Barrier(4)

        def race(number: int) -> list[str]:
            start.wait()
            first = claim(any_service.sessions, job_ids[number], owner=f"thread {number}", ttl=TTL)
            if first is None:
                return []
            return [
                first.job_id,
                *(each.job_id for each in claim_companions(any_service.sessions, first, at_most=3, ttl=TTL)),
            ]

        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(race, range(4)))

        assert {len(of_one) for of_one in taken} <= {0, 4}
        everything = [job_id for of_one in taken for job_id in of_one]
        assert len(everything) == len(set(everything)) >= 4
        attempts = {job_id: any_service.job(job_id).attempt for job_id in job_ids}
        assert attempts == {job_id: int(job_id in everything) for job_id in job_ids}

    def test_one_of_many_threads_wins(self, any_service: Service) -> None:
        job_ids = [any_service.add_job() for _ in range(5)]
        start = Barrier(8)

        def race(number: int) -> list[Lease | None]:
            start.wait()
            return [claim(any_service.sessions, job_id, owner=f"thread {number}", ttl=TTL) for job_id in job_ids]

        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(race, range(8)))

        for job_id, of_job in zip(job_ids, zip(*claims, strict=True), strict=True):
            (winner,) = [lease for lease in of_job if lease is not None]
            job = any_service.job(job_id)
            assert (job.attempt, job.lease_owner) == (1, winner.owner)

    def test_one_of_many_threads_takes_over(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        any_service.claim(job_id, ttl=EXPIRED)
        start = Barrier(8)

        def race(number: int) -> Lease | None:
            start.wait()
            return claim(any_service.sessions, job_id, owner=f"thread {number}", ttl=TTL)

        with ThreadPoolExecutor(8) as pool:
            winners = [lease for lease in pool.map(race, range(8)) if lease is not None]

        assert [lease.attempt for lease in winners] == [2]

    def test_one_of_many_processes_wins(self, any_service: Service) -> None:
        job_ids = [any_service.add_job() for _ in range(20)]
        script = (
            "import sys; from datetime import timedelta\n"
            "from api.database import make_engine, make_sessions; from worker.lease import claim\n"
            "sessions = make_sessions(make_engine(sys.argv[1])); print('ready', flush=True); sys.stdin.readline()\n"
            "for job_id in sys.argv[2:]:\n"
            "    if claim(sessions, job_id, owner='p', ttl=timedelta(minutes=1)): print(job_id)\n"
        )
        command = [sys.executable, "-c", script, any_service.settings.database_url, *job_ids]
        racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [line for racer in racers for line in racer.communicate(timeout=60)[0].split()]

        assert sorted(won) == sorted(job_ids)
        assert {any_service.job(job_id).attempt for job_id in job_ids} == {1}


class TestRenew:
    def test_holds_on(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        lease = any_service.claim(job_id, ttl=EXPIRED)

        renewal = renew(any_service.sessions, lease, ttl=TTL)

        assert (renewal.ours, renewal.cancel_requested, renewal.pause_requested) == (True, False, False)
        until = any_service.job(job_id).lease_until
        assert until is not None
        assert until > now() + TTL / 2

    @pytest.mark.parametrize("what", ["cancel_requested", "pause_requested"])
    def test_sees_what_was_asked_for(self, any_service: Service, what: str) -> None:
        job_id = any_service.add_job()
        lease = any_service.claim(job_id)
        any_service.update(job_id, **{what: True})

        renewal = renew(any_service.sessions, lease, ttl=TTL)
        asked = {name for name in ("cancel_requested", "pause_requested") if getattr(renewal, name)}
        assert (renewal.ours, asked) == (True, {what})

    def test_sees_that_somebody_took_over(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        lease = any_service.claim(job_id, ttl=EXPIRED)
        second = any_service.claim(job_id, owner="two")
        before = any_service.job(job_id).lease_until

        assert not renew(any_service.sessions, lease, ttl=timedelta(hours=1)).ours
        assert any_service.job(job_id).lease_until == before
        assert renew(any_service.sessions, second, ttl=TTL).ours


class TestFencing:
    def test_an_old_attempt_writes_nothing(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        old = any_service.claim(job_id, ttl=EXPIRED)
        new = any_service.claim(job_id, owner="two")

        with pytest.raises(LeaseLost, match="attempt 1 of one"), writing(any_service.sessions, old) as (session, _):
            add_adapter(session, old, "ft:old")
        with writing(any_service.sessions, new) as (session, _):
            add_adapter(session, new, f"ft:{job_id}")

        names = [adapter.id for adapter in any_service.adapters() if adapter.job_id == job_id]
        assert names == [f"ft:{job_id}"]

    def test_nobody_takes_over_during_a_write(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        lease = any_service.claim(job_id, ttl=EXPIRED)
        with ThreadPoolExecutor(1) as pool, writing(any_service.sessions, lease) as (_, job):
            rival = pool.submit(claim, any_service.sessions, job_id, owner="two", ttl=TTL)
            with pytest.raises(TimeoutError):
                rival.result(timeout=0.3)
            job.status = JobStatus.SUCCEEDED

        assert rival.result(timeout=10) is None
        assert any_service.job(job_id).status == "succeeded"

    def test_a_finished_job_is_not_written_to(self, service: Service) -> None:
        job_id = service.add_job()
        lease = service.claim(job_id)
        service.update(job_id, status=JobStatus.CANCELLED)

        with pytest.raises(LeaseLost), writing(service.sessions, lease):
            pass
        with pytest.raises(LeaseLost):
            results.interrupt(service.sessions, lease)
        assert service.job(job_id).status == "cancelled"

    def test_a_failing_body_writes_nothing(self, service: Service) -> None:
        lease = service.claim(service.add_job())

        def write_half() -> None:
            with writing(service.sessions, lease) as (session, job):
                job.fine_tuned_model = "ft:half"
                add_adapter(session, lease, "ft:half")
                session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write_half()
        assert service.job(lease.job_id).fine_tuned_model is None
        assert service.adapters() == []
