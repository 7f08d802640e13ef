"""Jobs that a trainer takes at once: each comes to its own end, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sqlalchemy import and_, select

from api.database import new_id
from api.jobs.models import Job
from api.models.models import Adapter
from api.projects.models import Project
from tests.worker import fake_training
from tests.worker.fake_training import learned, number_of
from tests.worker.support import BASE_MODEL, Service, chat_rows, wait_until
from tests.worker.test_going_on import (
    STEPS,
    assert_went_on,
    kept_step,
    long_job,
    pause,
    resume,
    training,
    wait_for_state,
    worker_of,
)
from uora.artifact import Artifact, loads
from uora.spec import TrainingSpec
from worker import child_process
from worker.child_process import ChildProcess
from worker.context import Resources
from worker.tasks.training import train

KEY = "the key of all jobs here"


@pytest.fixture
def held(any_service: Service) -> Resources:
    return worker_of(any_service)


@pytest.fixture
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "COMMAND", fake_training.COMMAND)


def short_job(service: Service, **values: Any) -> str:
    """Four steps."""
    return service.add_job(**{"cotraining_key": KEY, **values})


def two_seconds(service: Service) -> str:
    """`STEPS` steps, of which a state is kept."""
    job_id = long_job(service)
    service.update(job_id, cotraining_key=KEY)
    return job_id


def of_stranger(service: Service, *, rows: int = 8) -> dict[str, str]:
    """Values of a job of another project."""
    with service.sessions.begin() as session:
        stranger = Project(id=new_id("proj_"), name="Other", slug=new_id("other-"))
        session.add(stranger)
    return {"project_id": stranger.id, "training_file": service.add_file(chat_rows(rows), project_id=stranger.id)}


def result(service: Service, job_id: str) -> Artifact:
    with service.sessions() as session:
        same = and_(Job.fine_tuned_model == Adapter.id, Job.project_id == Adapter.project_id)
        artifact = session.execute(select(Adapter.artifact).join(Job, same).where(Job.id == job_id)).scalar_one()
        return loads(artifact)


def statuses(service: Service, *job_ids: str) -> list[str]:
    return [service.job(job_id).status for job_id in job_ids]


def kill_child() -> None:
    for child in psutil.Process(os.getpid()).children():
        if "tests.worker.fake_training" in child.cmdline():
            child.send_signal(signal.SIGKILL)


@pytest.mark.usefixtures("_without_torch")
class TestTogether:
    def test_jobs_of_two_projects_share_a_process_and_know_nothing_of_it(
        self, any_service: Service, held: Resources, started: list[ChildProcess]
    ) -> None:
        foreign = short_job(any_service, **of_stranger(any_service))
        job_ids = [short_job(any_service), foreign, short_job(any_service)]
        train(held, job_ids[0])
        for job_id in job_ids:
            train(held, job_id)  # its own message comes late

        assert len(started) == 1
        assert statuses(any_service, *job_ids) == ["succeeded"] * 3
        told = {
            job_id: [
                (event.message, event.data)
                for kind in ("message", "metrics")
                for event in any_service.events(job_id, kind)
            ]
            for job_id in job_ids
        }
        for job_id in job_ids:
            assert any_service.job(job_id).attempt == 1
            assert number_of(result(any_service, job_id)) == learned(4)
            assert not [other for other in job_ids if other != job_id and other in json.dumps(told[job_id])]
            assert all("run" not in (data or {}) for _, data in told[job_id])
        assert len({len(events) for events in told.values()}) == 1

    def test_a_short_one_is_done_while_a_long_one_goes_on(self, service: Service) -> None:
        held = worker_of(service)
        longer, shorter = two_seconds(service), short_job(service)
        with training(held, longer):
            wait_until(lambda: service.job(shorter).status == "succeeded", what="the end of the short one")
            assert service.job(longer).status == "running"
        assert_went_on(service, longer)

    def test_no_more_than_the_setting_the_oldest_first(self, service: Service) -> None:
        old, named, newer, newest = (short_job(service) for _ in range(4))
        train(worker_of(service, cotrain_jobs=3), named)
        assert statuses(service, old, named, newer, newest) == ["succeeded", "succeeded", "succeeded", "queued"]

    def test_one_by_one_where_the_setting_says_so(self, service: Service) -> None:
        first, second = short_job(service), short_job(service)
        train(worker_of(service, cotrain_jobs=1), first)
        assert statuses(service, first, second) == ["succeeded", "queued"]

    @pytest.mark.parametrize("key", [None, "another"])
    def test_only_with_the_same_key(self, service: Service, key: str | None) -> None:
        first, second = short_job(service, cotraining_key=key), short_job(service)
        other = short_job(service, cotraining_key=None)
        train(worker_of(service), first)
        assert statuses(service, first, second, other) == ["succeeded", "queued", "queued"]


@pytest.mark.usefixtures("_without_torch")
class TestOneOfSeveral:
    """What becomes of one leaves the others alone."""

    def test_is_cancelled(self, any_service: Service, held: Resources, started: list[ChildProcess]) -> None:
        cancelled, other = two_seconds(any_service), two_seconds(any_service)
        with training(held, cancelled):
            wait_for_state(any_service, cancelled)
            any_service.update(cancelled, cancel_requested=True)
            wait_until(lambda: any_service.job(cancelled).status == "cancelled", what="the cancel", seconds=2)
            assert any_service.job(other).status == "running"

        assert len(started) == 1
        assert kept_step(any_service, cancelled) == 0
        assert any_service.messages(cancelled)[-1] == "Cancelled"
        assert_went_on(any_service, other)

    def test_is_paused_and_goes_on_later_with_another(self, any_service: Service, held: Resources) -> None:
        paused, other = two_seconds(any_service), two_seconds(any_service)
        with training(held, other):
            wait_for_state(any_service, paused)
            pause(any_service, paused)
            wait_until(lambda: any_service.job(paused).status == "paused", what="the pause", seconds=3)
            assert any_service.job(other).status == "running"
        assert_went_on(any_service, other)
        step = kept_step(any_service, paused)
        assert 0 < step < STEPS

        resume(any_service, paused)
        third = short_job(any_service)
        train(held, third)
        assert_went_on(any_service, paused)
        assert f"Resuming from step {step}" in any_service.messages(paused)
        assert number_of(result(any_service, third)) == learned(4)

    def test_is_taken_over(self, service: Service) -> None:
        held = worker_of(service)
        lost, other = two_seconds(service), two_seconds(service)
        with training(held, other):
            wait_for_state(service, lost)
            service.update(lost, attempt=2, lease_owner="two")
        before = service.messages(lost)

        job = service.job(lost)
        assert (job.status, job.lease_owner, job.attempt) == ("running", "two", 2)
        assert job.fine_tuned_model is None
        assert before == ["Fine-tuning job started", *(m for m in before if m.startswith("Checkpoint"))]
        assert_went_on(service, other)

    @pytest.mark.parametrize("gone", [True, False])
    def test_has_no_good_file(self, service: Service, gone: bool) -> None:
        held = worker_of(service)
        bad, *good = [
            short_job(service, training=chat_rows(2) + b"{}\n"),
            short_job(service),
            short_job(service),
        ]
        if gone:
            service.storage.delete(service.job(bad).training_file)
        train(held, good[0])

        assert statuses(service, bad, *good) == ["failed", "succeeded", "succeeded"]
        error = service.job(bad).error
        assert error is not None
        assert gone or (error["code"], error["param"]) == ("missing_messages", "training_file")
        assert [number_of(result(service, job_id)) for job_id in good] == [learned(4)] * 2


@pytest.mark.usefixtures("_without_torch")
class TestAllOfThem:
    def test_after_a_crash_each_is_trained_alone(self, service: Service, started: list[ChildProcess]) -> None:
        held = worker_of(service)
        job_ids = [two_seconds(service), two_seconds(service)]
        with training(held, job_ids[0]):
            for job_id in job_ids:
                wait_for_state(service, job_id)
            kill_child()

        for job_id in job_ids:
            job = service.job(job_id)
            assert (job.status, job.error, job.lost_trainers, job.cotraining_key) == ("queued", None, 0, None)
        for trained, job_id in enumerate(job_ids, start=1):
            train(held, job_id)
            assert statuses(service, *job_ids) == ["succeeded"] * trained + ["queued"] * (2 - trained)
            assert_went_on(service, job_id)
        assert len(started) == 3

    def test_a_shutdown_gives_all_back_and_they_go_on_together(
        self, service: Service, started: list[ChildProcess]
    ) -> None:
        held = worker_of(service)
        job_ids = [two_seconds(service), two_seconds(service)]
        with training(held, job_ids[0]):
            for job_id in job_ids:
                wait_for_state(service, job_id)
            held.stopping.set()

        for job_id in job_ids:
            job = service.job(job_id)
            assert (job.status, job.lost_trainers, job.cotraining_key) == ("queued", 0, KEY)
            assert kept_step(service, job_id) > 0
        train(worker_of(service), job_ids[1])
        for job_id in job_ids:
            assert_went_on(service, job_id)
        assert len(started) == 2


class TestScripted:
    """Children that say what they are told to."""

    @pytest.fixture
    def say(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        def use(script: str) -> None:
            prelude = "import json, sys, time\nsys.stdin.readline()\ndef say(**r): print(json.dumps(r), flush=True)\n"
            monkeypatch.setattr(child_process, "COMMAND", (sys.executable, "-c", prelude + script))

        return use

    @pytest.mark.parametrize(
        ("kind", "code", "alone"),
        [("platform", "internal_error", True), ("user", "out_of_memory", True), ("user", "training_diverged", False)],
    )
    def test_a_failure_that_may_be_anothers_is_tried_again_alone(
        self, service: Service, say: Any, kind: str, code: str, alone: bool
    ) -> None:
        say(f"for i in (0, 1): say(type='failed', run=i, failure=dict(kind={kind!r}, code={code!r}, message='m'))")
        held = worker_of(service)
        job_ids = [short_job(service), short_job(service)]
        train(held, job_ids[0])
        assert statuses(service, *job_ids) == ["queued" if alone else "failed"] * 2
        if alone:
            train(held, job_ids[0])
            assert statuses(service, *job_ids) == ["failed", "queued"]

    def test_the_child_is_told_which_one_is_cancelled(self, service: Service, say: Any) -> None:
        say(
            "say(type='started', run=0, total_steps=1); stop = json.loads(sys.stdin.readline())['stop']\n"
            "say(type='stopped', run=1 - stop); time.sleep(60)"
        )
        cancelled, other = short_job(service), short_job(service)
        with training(worker_of(service), cancelled):
            wait_until(lambda: service.messages(cancelled), what="its start", seconds=5)
            service.update(cancelled, cancel_requested=True)
        assert statuses(service, cancelled, other) == ["cancelled", "queued"]

    def test_one_that_does_not_stop_is_not_waited_for(self, service: Service, say: Any) -> None:
        say("say(type='started', run=0, total_steps=1); time.sleep(60)")
        held = worker_of(service, pause_grace=timedelta(seconds=0.5), stop_grace=timedelta(seconds=0.2))
        deaf, other = short_job(service), short_job(service)
        with training(held, deaf):
            wait_until(lambda: service.messages(deaf), what="its start", seconds=5)
            pause(service, deaf)
            wait_until(lambda: service.job(deaf).status == "paused", what="the pause", seconds=3)
            assert service.job(other).status == "running"
            held.stopping.set()
        assert statuses(service, deaf, other) == ["paused", "queued"]


def test_real_jobs_come_to_what_each_comes_to_alone(
    service: Service, tiny_model: Path, started: list[ChildProcess], tmp_path: Path
) -> None:
    import torch

    from tests.uora.task_cases import Recorder
    from uora.data import read_file
    from uora.models import fetch
    from uora.training import train as train_alone

    held = service.resources(base_models={BASE_MODEL: f"path:{tiny_model}"})
    job_ids = [
        short_job(service, rows=8, n_epochs=3, validation=chat_rows(3)),
        short_job(service, rows=6, n_epochs=2, **of_stranger(service, rows=6)),
        short_job(service, rows=3, n_epochs=1),
        short_job(service, rows=7, n_epochs=4, **of_stranger(service, rows=7)),
    ]
    train(held, job_ids[2])

    assert len(started) == 1
    base = fetch(BASE_MODEL, f"path:{tiny_model}", cache_dir=tmp_path)
    for job_id in job_ids:
        job = service.job(job_id)
        assert (job.status, job.error) == ("succeeded", None)
        with (
            service.storage.local_path(job.training_file) as rows,
            service.storage.local_path(job.validation_file or job.training_file) as validation,
        ):
            expected = train_alone(
                TrainingSpec.model_validate(job.training_spec),
                base=base,
                training=read_file(rows, "chat"),
                validation=read_file(validation, "chat") if job.validation_file else None,
                observer=Recorder(),
                cache_dir=tmp_path,
                dtype=torch.float32,
            )
        found, alone = result(service, job_id), loads(expected.artifact)
        for name, tensor in alone.tensors.items():
            np.testing.assert_allclose(found.tensors[name], tensor, atol=2e-4, err_msg=name)
        assert found.manifest.metrics == pytest.approx(alone.manifest.metrics, abs=1e-4)
        assert job.trained_tokens == expected.trained_tokens
