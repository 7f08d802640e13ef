"""A job never starts over: paused, shut down, killed or taken over, it goes on from its kept state."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from api.caller import Caller
from api.database import now
from api.jobs import service as jobs
from api.jobs.models import Job, JobStatus, TrainingState
from api.models.models import Adapter
from api.unit_of_work import UnitOfWork, open_unit_of_work
from tests.worker import fake_training
from tests.worker.artifacts import make_artifact
from tests.worker.fake_training import learned, number_of
from tests.worker.support import BASE_MODEL, TTL, Service, chat_rows, wait_until
from uora.artifact import loads
from uora.spec import TrainingOptions
from worker import child_process, progress
from worker.child import ReportingObserver
from worker.context import Resources
from worker.lease import LeaseLost, claim
from worker.messages import Evaluated, State, Step, parse_report
from worker.progress import JobProgress
from worker.sweeping import sweep
from worker.tasks.training import train

EXPIRED = timedelta(seconds=-1)
#: Of `long_job`.
STEPS = 40
SAVE_STEPS = 5


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "COMMAND", fake_training.COMMAND)


@pytest.fixture
def held(any_service: Service) -> Resources:
    return worker_of(any_service)


def worker_of(service: Service, **changes: object) -> Resources:
    """Another worker process."""
    times = {"lease_ttl": timedelta(seconds=3), "pause_grace": timedelta(seconds=10)}
    return service.resources(**{**times, "base_models": {BASE_MODEL: "path:/nowhere"}, **changes})


def long_job(service: Service) -> str:
    """Two seconds."""
    options = TrainingOptions(save_steps=SAVE_STEPS)
    return service.add_job(rows=8, n_epochs=10, validation=chat_rows(2), training_options=options)


@contextmanager
def training(held: Resources, job_id: str) -> Iterator[None]:
    """Another worker trains the job until the block has ended and the run is over."""
    thread = threading.Thread(target=train, args=(held, job_id))
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=30)
        assert not thread.is_alive()


def state_of(service: Service, job_id: str) -> TrainingState | None:
    with service.sessions() as session:
        return session.scalar(select(TrainingState).where(TrainingState.job_id == job_id))


def kept_step(service: Service, job_id: str) -> int:
    state = state_of(service, job_id)
    return 0 if state is None else state.step


def wait_for_state(service: Service, job_id: str, *, after: int = 0) -> None:
    wait_until(lambda: kept_step(service, job_id) > after, what="a state", seconds=20)


def user(service: Service) -> Caller:
    return Caller(project_id=service.project.id, project_slug=service.project.slug, key_id="key")


def resume(service: Service, job_id: str) -> None:
    with open_unit_of_work(service.sessions, service.queue) as work:
        jobs.resume(work, user(service), job_id)


def pause(service: Service, job_id: str) -> None:
    with service.sessions.begin() as session:
        jobs.pause(session, user(service), job_id)


def assert_went_on(service: Service, job_id: str) -> None:
    """The job has the model of a run that nothing happened to, and each of its steps is told once."""
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    with service.sessions() as session:
        final = session.scalar(select(Adapter).where(Adapter.id == job.fine_tuned_model))
        assert final is not None
        assert number_of(loads(final.artifact)) == learned(STEPS)
    events = [event.data or {} for event in service.events(job_id, "metrics")]
    assert [data["step"] for data in events if "trained_tokens" in data] == [*range(1, STEPS + 1)]
    assert [data["step"] for data in events if "valid_loss" in data] == [8, 16, 24, 32, 40]
    assert [row.step_number for row in service.checkpoints() if row.job_id == job_id] == [8, 16, 24, 32, 40]
    assert [message for message in service.messages(job_id) if message == "Fine-tuning job started"] != []
    assert state_of(service, job_id) is None


def test_a_run_that_nothing_happens_to(any_service: Service, held: Resources) -> None:
    job_id = long_job(any_service)
    train(held, job_id)

    assert_went_on(any_service, job_id)
    assert any_service.job(job_id).best_step == STEPS
    assert any_service.job(job_id).stopped_early is False


def test_pause_and_resume(any_service: Service, held: Resources) -> None:
    job_id = long_job(any_service)
    with training(held, job_id):
        wait_for_state(any_service, job_id)
        pause(any_service, job_id)

    job = any_service.job(job_id)
    step = kept_step(any_service, job_id)
    assert (job.status, job.pause_requested, job.lease_owner, job.lost_trainers) == ("paused", False, None, 0)
    assert 0 < step < STEPS
    assert job.progress is not None
    assert job.progress["step"] == step
    assert "Pause requested" in any_service.messages(job_id)
    assert any_service.messages(job_id)[-1] == f"Paused after step {step}"
    first_start = job.started_at

    train(worker_of(any_service), job_id)  # a late message
    sweep(any_service.resources())
    assert (any_service.job(job_id).status, any_service.job(job_id).attempt) == ("paused", 1)
    assert job_id not in [rung for _, rung in any_service.queue.sent]

    resume(any_service, job_id)
    train(worker_of(any_service), job_id)
    train(worker_of(any_service), job_id)  # the message again
    assert_went_on(any_service, job_id)
    assert f"Resuming from step {step}" in any_service.messages(job_id)
    assert (any_service.job(job_id).attempt, any_service.job(job_id).started_at) == (2, first_start)


def test_shutdown_keeps_what_was_done(any_service: Service, held: Resources) -> None:
    job_id = long_job(any_service)
    with training(held, job_id):
        wait_for_state(any_service, job_id)
        held.stopping.set()

    job = any_service.job(job_id)
    assert (job.status, job.lost_trainers) == ("queued", 0)
    assert kept_step(any_service, job_id) > 0
    train(worker_of(any_service), job_id)
    assert_went_on(any_service, job_id)


def test_a_killed_child_fails_its_job_which_can_be_resumed(any_service: Service, held: Resources) -> None:
    job_id = long_job(any_service)
    with training(held, job_id):
        wait_for_state(any_service, job_id)
        _kill_children()

    job = any_service.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "out_of_memory_or_killed")
    assert "GiB" in job.error["message"]
    step = kept_step(any_service, job_id)
    assert step % SAVE_STEPS == 0

    resume(any_service, job_id)
    assert (any_service.job(job_id).error, any_service.job(job_id).finished_at) == (None, None)
    train(worker_of(any_service), job_id)
    assert_went_on(any_service, job_id)
    assert f"Resuming from step {step}" in any_service.messages(job_id)


def test_who_takes_over_goes_on(any_service: Service, held: Resources) -> None:
    job_id = long_job(any_service)
    slow = worker_of(any_service, heartbeat_interval=timedelta(seconds=1000), lease_ttl=timedelta(seconds=1000))
    with training(slow, job_id):
        wait_for_state(any_service, job_id)
        any_service.update(job_id, lease_until=now() + EXPIRED)
        train(held, job_id)

    assert_went_on(any_service, job_id)
    assert any_service.job(job_id).attempt == 2


def test_a_cancel_drops_the_state(any_service: Service, held: Resources) -> None:
    running, paused = long_job(any_service), long_job(any_service)
    with training(held, running):
        wait_for_state(any_service, running)
        with any_service.sessions.begin() as session:
            jobs.cancel(UnitOfWork(session), user(any_service), running)
    with training(worker_of(any_service), paused):
        wait_for_state(any_service, paused)
        pause(any_service, paused)
    with any_service.sessions.begin() as session:
        jobs.cancel(UnitOfWork(session), user(any_service), paused)

    for job_id in (running, paused):
        assert any_service.job(job_id).status == "cancelled"
        assert state_of(any_service, job_id) is None


def test_a_withdrawn_pause_costs_a_restart_and_no_step(any_service: Service, held: Resources) -> None:
    job_id = long_job(any_service)
    with training(held, job_id):
        wait_for_state(any_service, job_id)
        pause(any_service, job_id)
        resume(any_service, job_id)
    if any_service.job(job_id).status != "succeeded":  # the trainer saw the pause in between
        assert any_service.job(job_id).status == "queued"
        train(worker_of(any_service), job_id)
    assert_went_on(any_service, job_id)


class TestGrace:
    """A child that does not stop in time."""

    @pytest.fixture
    def deaf(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It keeps a state, and does not hear SIGTERM."""
        script = (
            "import json, os, sys, time, signal; from pathlib import Path\n"
            "os.chdir(json.loads(sys.stdin.readline())['runs'][0]['work_dir'])\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "Path('s').write_bytes(b'kept')\n"
            "for report in ({'type': 'started', 'total_steps': 9}, {'type': 'state', 'step': 3, 'file': 's'}):\n"
            "    print(json.dumps(report), flush=True)\n"
            "time.sleep(60)"
        )
        command = (fake_training.COMMAND[0], "-c", script)
        monkeypatch.setattr(child_process, "COMMAND", command)

    @pytest.mark.usefixtures("deaf")
    @pytest.mark.parametrize("by_shutdown", [True, False])
    def test_is_killed_and_its_last_state_remains(self, service: Service, by_shutdown: bool) -> None:
        ttl = timedelta(seconds=1)
        held = worker_of(service, lease_ttl=ttl, pause_grace=timedelta(seconds=2.5), stop_grace=timedelta(seconds=0.2))
        job_id = long_job(service)
        left = []
        with training(held, job_id):
            wait_for_state(service, job_id)
            if by_shutdown:
                held.stopping.set()
            else:
                pause(service, job_id)
            while service.job(job_id).status == JobStatus.RUNNING:
                until = service.job(job_id).lease_until
                if until is not None:
                    left.append(until - now())
                time.sleep(0.1)

        job, state = service.job(job_id), state_of(service, job_id)
        assert state is not None
        assert (job.status, state.step) == ("queued" if by_shutdown else "paused", 3)
        assert len(left) > 10  # the lease was held all the while
        assert min(left) > timedelta(0)


class TestState:
    """What is kept, and who may keep it."""

    def test_the_newest_replaces_the_one_before(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())
        record = JobProgress(any_service.sessions, lease)
        record.on_start(60)
        for step, content in ((5, b"five"), (10, b"ten"), (10, b"ten")):  # an answer may be lost, so once more
            record.on_step(make_step(step))
            record.on_state(State(step=step, file="s"), content)

        with any_service.sessions() as session:
            (state,) = session.scalars(select(TrainingState))
            assert (state.job_id, state.attempt, state.step, state.bytes) == (lease.job_id, 1, 10, 3)
            assert state.state == b"ten"
        shown = any_service.job(lease.job_id).progress
        assert shown is not None
        assert shown["step"] == 10

    def test_a_step_whose_state_is_given_twice(self, tmp_path: Path) -> None:
        """The parent may remove the first file when the second is there already."""
        stream = io.StringIO()
        observer = ReportingObserver(0, tmp_path, stream)
        for content in (b"periodic", b"at the stop"):
            observer.on_state(20, content)

        said = [parse_report(line) for line in stream.getvalue().splitlines()]
        assert all(isinstance(report, State) and report.step == 20 for report in said)
        files = [report.file for report in said if isinstance(report, State)]
        assert [(tmp_path / file).read_bytes() for file in files] == [b"periodic", b"at the stop"]

    def test_an_attempt_that_lost_its_lease_keeps_nothing(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        old = any_service.claim(job_id, ttl=EXPIRED)
        JobProgress(any_service.sessions, old).on_state(State(step=5, file="s"), b"five")
        any_service.claim(job_id, owner="two")

        with pytest.raises(LeaseLost):
            JobProgress(any_service.sessions, old).on_state(State(step=10, file="s"), b"stale")
        assert kept_step(any_service, job_id) == 5

    def test_one_that_no_database_takes_is_left_out_and_said_once(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(progress, "MAX_STATE_BYTES", 10)
        lease = service.claim(service.add_job())
        record = JobProgress(service.sessions, lease)
        for step in (5, 10):
            record.on_state(State(step=step, file="s"), b"eleven bytes")

        assert state_of(service, lease.job_id) is None
        (warning,) = service.messages(lease.job_id)
        assert "more than can be kept" in warning

    def test_it_goes_with_its_job(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())
        JobProgress(any_service.sessions, lease).on_state(State(step=5, file="s"), b"five")
        with any_service.sessions.begin() as session:
            session.delete(session.execute(select(Job).where(Job.id == lease.job_id)).scalar_one())

        assert state_of(any_service, lease.job_id) is None


class TestLostTrainers:
    """A long job on machines that come and go."""

    def test_only_those_without_progress_count(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        for step in range(1, 8):
            lease = claim(any_service.sessions, job_id, owner="one", ttl=EXPIRED, max_attempts=2)
            assert lease is not None
            JobProgress(any_service.sessions, lease).on_state(State(step=step, file="s"), b"state")
            sweep(any_service.resources(max_attempts=2))
        assert any_service.job(job_id).status == "running"

        claim(any_service.sessions, job_id, owner="one", ttl=EXPIRED, max_attempts=2)
        sweep(any_service.resources(max_attempts=2))
        error = any_service.job(job_id).error
        assert error is not None
        assert error["code"] == "trainer_lost"
        assert kept_step(any_service, job_id) == 7

    def test_the_same_state_again_is_no_progress(self, service: Service) -> None:
        job_id = service.add_job()
        for _ in range(2):
            lease = service.claim(job_id, ttl=EXPIRED)
            JobProgress(service.sessions, lease).on_state(State(step=5, file="s"), b"state")

        assert service.job(job_id).lost_trainers == 1

    def test_a_pause_that_no_trainer_saw(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        lease = any_service.claim(job_id, ttl=EXPIRED)
        JobProgress(any_service.sessions, lease).on_state(State(step=5, file="s"), b"state")
        pause(any_service, job_id)

        assert claim(any_service.sessions, job_id, owner="two", ttl=TTL) is None
        sweep(any_service.resources())
        assert any_service.job(job_id).status == "paused"
        assert any_service.messages(job_id)[-1] == "Paused after step 5"


def test_steps_made_again_are_told_once(any_service: Service) -> None:
    job_id = any_service.add_job()
    first = JobProgress(any_service.sessions, any_service.claim(job_id, ttl=EXPIRED))
    first.on_start(60)
    for number in (1, 2, 3):
        first.on_step(make_step(number))
    first.on_evaluation(Evaluated(step=3, metrics={"valid_loss": 0.5}, file="a"), make_artifact())
    second = JobProgress(any_service.sessions, any_service.claim(job_id, owner="two"))
    second.on_start(60)
    for number in (3, 4):
        second.on_step(make_step(number))
    second.on_evaluation(Evaluated(step=3, metrics={"valid_loss": 0.5}, file="a"), make_artifact())

    steps = [(event.data or {})["step"] for event in any_service.events(job_id, "metrics")]
    assert steps == [1, 2, 3, 3, 4]  # the second 3 is the evaluation
    assert len(any_service.checkpoints()) == 1
    assert all(a.seq < b.seq for a, b in pairwise(any_service.events(job_id, "metrics")))


def make_step(number: int) -> Step:
    return Step(
        step=number,
        total_steps=60,
        train_loss=0.5,
        train_mean_token_accuracy=0.75,
        learning_rate=0.01,
        gradient_norm=1.5,
        tokens_per_second=321.0,
        seconds_left=90.0,
        hits=0,
        trained_tokens=number,
    )


def _kill_children() -> None:
    for child in psutil.Process(os.getpid()).children():
        if "tests.worker.fake_training" in child.cmdline():
            child.send_signal(signal.SIGKILL)
