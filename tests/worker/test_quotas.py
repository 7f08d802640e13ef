"""How many jobs of a project run at once, and what those that ran are charged for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest

from api.database import new_id
from api.jobs.models import Job, JobStatus
from api.jobs.repository import places
from api.projects.models import Project
from api.queue import TaskName
from api.usage.models import UsageRecord
from tests.worker.artifacts import make_artifact
from tests.worker.support import TTL, Service
from tests.worker.test_progress import make_finished, make_step
from worker import results
from worker.failures import INTERNAL
from worker.lease import LeaseLost, claim, claim_companions
from worker.messages import State
from worker.progress import JobProgress, Trained
from worker.supervisor import CancelRequested
from worker.sweeping import MAX_RINGS, sweep
from worker.tasks.training import _settle, train

EXPIRED = timedelta(seconds=-1)


def limit(service: Service, jobs_running: int | None) -> None:
    with service.sessions.begin() as session:
        session.query(Project).filter_by(id=service.project.id).update({"jobs_running": jobs_running})


def add_project(service: Service) -> str:
    with service.sessions.begin() as session:
        session.add(project := Project(id=new_id("proj_"), name="Other", slug=new_id("other-")))
        return project.id


class TestRunningJobs:
    def test_one_more_waits_and_others_overtake(self, any_service: Service) -> None:
        limit(any_service, 1)
        first, second = any_service.add_job(), any_service.add_job()
        others = any_service.add_job(project_id=add_project(any_service))
        lease = any_service.claim(first)
        assert claim(any_service.sessions, second, owner="two", ttl=TTL) is None
        assert any_service.job(second).status == JobStatus.QUEUED
        assert claim(any_service.sessions, others, owner="two", ttl=TTL) is not None
        seq = any_service.job(second).seq
        with any_service.sessions() as session:
            assert places(session, [seq]) == {seq: 1}
        results.fail(any_service.sessions, lease, INTERNAL)
        assert claim(any_service.sessions, second, owner="two", ttl=TTL) is not None

    @pytest.mark.parametrize(("own", "default", "free"), [(None, 1, False), (0, 1, True), (2, 1, True), (1, 0, False)])
    def test_an_own_limit_goes_before_that_of_the_settings(
        self, service: Service, own: int | None, default: int, free: bool
    ) -> None:
        limit(service, own)
        service.claim(service.add_job())
        lease = claim(service.sessions, service.add_job(), owner="two", ttl=TTL, max_running=default)
        assert (lease is not None) == free

    def test_a_lost_job_is_taken_over_within_it(self, any_service: Service) -> None:
        limit(any_service, 1)
        job_id = any_service.add_job()
        any_service.claim(job_id, ttl=EXPIRED)
        assert claim(any_service.sessions, any_service.add_job(), owner="two", ttl=TTL) is None
        assert claim(any_service.sessions, job_id, owner="two", ttl=TTL) is not None

    def test_trainers_at_once_do_not_go_over(self, any_service: Service) -> None:
        limit(any_service, 2)
        jobs = [any_service.add_job() for _ in range(6)]
        barrier = Barrier(6)

        def take(job_id: str) -> bool:
            barrier.wait()
            return claim(any_service.sessions, job_id, owner=job_id, ttl=TTL) is not None

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(take, jobs)) == 2

    def test_companions_are_taken_as_far_as_it_goes(self, any_service: Service) -> None:
        limit(any_service, 2)
        jobs = [any_service.add_job(cotraining_key="same") for _ in range(4)]
        other = any_service.add_job(cotraining_key="same", project_id=add_project(any_service))
        taken = claim_companions(any_service.sessions, any_service.claim(jobs[0]), at_most=7, ttl=TTL)
        assert [lease.job_id for lease in taken] == [jobs[1], other]

    def test_an_end_rings_for_the_next(self, any_service: Service) -> None:
        limit(any_service, 1)
        held = any_service.resources()
        lease = any_service.claim(any_service.add_job())
        waiting = [any_service.add_job() for _ in range(2)]
        train(held, waiting[0])  # its message is used up
        _settle(held, lease, CancelRequested(), Trained())
        assert any_service.queue.take() == [(TaskName.TRAIN, waiting[0])]

    def test_an_end_without_a_limit_rings_for_nobody(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        service.add_job()
        _settle(service.resources(), lease, CancelRequested(), Trained())
        assert service.queue.take() == []

    def test_the_sweeper_rings_for_those_that_may_run(self, any_service: Service) -> None:
        """However many others are older."""
        limit(any_service, 1)
        any_service.claim(any_service.add_job())
        with any_service.sessions.begin() as session:
            for _ in range(MAX_RINGS):
                session.add(
                    Job(
                        id=new_id("ftjob-"),
                        project_id=any_service.project.id,
                        status=JobStatus.QUEUED,
                        model="tiny",
                        base_model="tiny",
                        training_file="file-x",
                        seed=1,
                        hyperparameters={},
                        adapter={},
                    )
                )
        other = any_service.add_job(project_id=add_project(any_service))
        sweep(any_service.resources())
        assert any_service.queue.take() == [(TaskName.TRAIN, other)]


class TestUsage:
    def used(self, service: Service, job_id: str) -> tuple[int, float]:
        with service.sessions() as session:
            rows = session.query(UsageRecord).filter_by(job_id=job_id).all()
        return sum(row.trained_tokens for row in rows), sum(row.seconds for row in rows)

    @pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
    def test_an_end_commits_what_was_trained(self, any_service: Service, end: str) -> None:
        job_id = any_service.add_job(key_id="key_j")
        lease = any_service.claim(job_id)
        progress = JobProgress(any_service.sessions, lease)
        progress.on_start(60)
        for number in (1, 2):  # the second is not written before the end
            progress.on_step(make_step(number).model_copy(update={"trained_tokens": 500 * number}))
        trained = progress.trained
        assert trained.tokens == 1000
        assert trained.seconds > 0
        if end == "succeed":
            finished = make_finished(make_artifact())
            results.succeed(any_service.sessions, lease, finished, storage=any_service.storage, trained=trained)
        elif end == "fail":
            results.fail(any_service.sessions, lease, INTERNAL, trained=trained)
        else:
            results.cancel(any_service.sessions, lease, trained=trained)
        expected = 1234 if end == "succeed" else 1000
        assert self.used(any_service, job_id) == (expected, pytest.approx(trained.seconds))
        with pytest.raises(LeaseLost):
            results.fail(any_service.sessions, lease, INTERNAL, trained=trained)
        assert self.used(any_service, job_id)[0] == expected

    def test_steps_that_are_made_again_are_counted_once(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        for tokens in (3000, 2000):  # the second attempt began before where the first was lost
            lease = any_service.claim(job_id, ttl=EXPIRED)
            progress = JobProgress(any_service.sessions, lease)
            progress.on_start(60)
            progress.on_step(make_step(1).model_copy(update={"trained_tokens": tokens}))
            progress.on_state(State(step=1, file="state"), b"state")
        assert self.used(any_service, job_id) == (0, 0)
        any_service.update(job_id, lost_trainers=2)
        sweep(any_service.resources())
        assert any_service.job(job_id).status == JobStatus.FAILED
        tokens, seconds = self.used(any_service, job_id)
        assert tokens == 3000
        assert seconds > 0

    def test_a_pause_is_counted_at_the_end(self, service: Service) -> None:
        job_id = service.add_job()
        lease = service.claim(job_id)
        service.update(job_id, pause_requested=True)
        results.interrupt(service.sessions, lease, trained=Trained(tokens=70, seconds=1.5))
        assert service.job(job_id).status == JobStatus.PAUSED
        assert self.used(service, job_id) == (0, 0)
        service.update(job_id, status=JobStatus.QUEUED)
        lease = service.claim(job_id)
        progress = JobProgress(service.sessions, lease)
        progress.on_start(60)
        assert progress.trained.seconds >= 1.5
        results.fail(service.sessions, lease, INTERNAL, trained=progress.trained)
        assert self.used(service, job_id)[0] == 70
