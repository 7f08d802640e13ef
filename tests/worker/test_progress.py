"""What users see while a job runs."""

from __future__ import annotations

import hashlib
import math
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event, select

from api.database import now
from api.files.models import File
from api.storage import LocalStore, StoredObject
from tests.worker.artifacts import make_artifact
from tests.worker.support import Service
from uora.artifact import loads
from uora.errors import DigestError
from worker import progress, results
from worker.failures import INTERNAL
from worker.lease import Lease, LeaseLost
from worker.measurements import measurements_csv
from worker.messages import Done, Evaluated, Metrics, Step, parse_report
from worker.progress import JobProgress, is_event_due
from worker.results import Finished

METRICS = {"train_loss": 0.5, "valid_loss": 0.7, "full_valid_loss": 0.7}


def make_step(number: int, *, total: int = 60, loss: float | None = 0.8349, seconds_left: float = 90.0) -> Step:
    return Step(
        step=number,
        total_steps=total,
        train_loss=loss,
        train_mean_token_accuracy=0.75,
        learning_rate=0.01,
        gradient_norm=1.5,
        tokens_per_second=321.0,
        seconds_left=seconds_left,
        hits=3,
        trained_tokens=1000,
    )


def make_finished(artifact: bytes) -> Finished:
    done = Done(file="final", trained_tokens=1234, steps=60, hits=0, metrics={}, stopped_early=True)
    return Finished(done, artifact)


def succeed(service: Service, lease: Lease) -> None:
    results.succeed(service.sessions, lease, make_finished(make_artifact()), storage=service.storage)


def stored_files(service: Service) -> list[str]:
    return [path.name for path in service.settings.storage_dir.iterdir()]


def test_a_model_names_what_it_was_trained_from(any_service: Service) -> None:
    for warm_start in (None, "ft:tiny:acme:older:12345678"):
        succeed(any_service, any_service.claim(any_service.add_job(warm_start=warm_start)))
        assert any_service.adapters()[-1].parent == warm_start


class TestSteps:
    def test_a_step_is_an_event_and_the_progress(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())
        record = JobProgress(any_service.sessions, lease)
        record.on_start(60)
        record.on_step(make_step(10))

        job = any_service.job(lease.job_id)
        assert job.progress == {
            "step": 10,
            "total_steps": 60,
            "train_loss": 0.8349,
            "learning_rate": 0.01,
            "gradient_norm": 1.5,
            "tokens_per_second": 321.0,
            "seconds_left": 90.0,
            "hits": 3,
        }
        assert job.estimated_finish is not None
        assert abs(job.estimated_finish - now() - timedelta(seconds=90)) < timedelta(seconds=10)
        (event,) = any_service.events(lease.job_id, "metrics")
        assert event.message == "Step 10/60: training loss=0.83"
        assert event.data == {
            "step": 10,
            "total_steps": 60,
            "train_loss": 0.8349,
            "train_mean_token_accuracy": 0.75,
            "learning_rate": 0.01,
            "gradient_norm": 1.5,
            "tokens_per_second": 321.0,
            "seconds_left": 90.0,
            "hits": 3,
            "trained_tokens": 1000,
        }
        assert any_service.messages(lease.job_id) == ["Fine-tuning job started"]

    def test_a_loss_that_is_no_number_is_stored_as_none(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())
        sent = make_step(1, loss=math.nan, seconds_left=math.inf).model_dump_json()
        step = parse_report(sent)
        assert isinstance(step, Step)
        JobProgress(any_service.sessions, lease).on_step(step)

        (event,) = any_service.events(lease.job_id, "metrics")
        assert event.data is not None
        assert (event.message, event.data["train_loss"]) == ("Step 1/60", None)
        assert any_service.job(lease.job_id).estimated_finish is None

    @pytest.mark.parametrize(("total", "events"), [(1, 1), (60, 60), (200, 200), (201, 102), (10_000, 201)])
    def test_events_are_thinned_out_on_long_runs(self, total: int, events: int) -> None:
        due = [step for step in range(1, total + 1) if is_event_due(step, total_steps=total)]

        assert len(due) == events
        assert (due[0], due[-1]) == (1, total)

    def test_between_events_the_progress_is_written_twice_a_second(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = 100.0
        monkeypatch.setattr(progress, "monotonic", lambda: clock)
        lease = service.claim(service.add_job())
        record = JobProgress(service.sessions, lease)
        written = []
        for number in range(2, 50):  # an eighth of a second each; of 10,000 steps the 50th is the next with an event
            clock += 0.125
            record.on_step(make_step(number, total=10_000))
            stored = service.job(lease.job_id).progress
            written.append(stored and stored["step"])

        assert service.events(lease.job_id, "metrics") == []
        assert len(set(written)) == 12


class TestCheckpoints:
    def test_a_checkpoint_and_its_adapter_come_together(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())
        artifact = make_artifact()
        record = JobProgress(any_service.sessions, lease)
        record.on_start(60)
        record.on_evaluation(Evaluated(step=30, metrics=METRICS | {"odd": None}, file="step-30"), artifact)

        (checkpoint,), (adapter,) = any_service.checkpoints(), any_service.adapters()
        name = f"ft:tiny:{any_service.project.slug}:greeter:{lease.job_id[-8:]}:ckpt-step-30"
        assert checkpoint.model_name == adapter.id == name
        assert (checkpoint.step_number, checkpoint.metrics) == (30, {"step": 30} | METRICS)
        assert (adapter.project_id, adapter.job_id) == (lease.project_id, lease.job_id)
        assert (adapter.base_model, adapter.checkpoint_step) == ("tiny", 30)
        assert adapter.digest == loads(artifact).manifest.digest == adapter.manifest["digest"]
        (event,) = any_service.events(lease.job_id, "metrics")
        assert event.message == "Step 30/60: training loss=0.50, validation loss=0.70, full validation loss=0.70"
        assert any_service.messages(lease.job_id)[-1] == "Checkpoint created at step 30"

    @pytest.mark.parametrize(("metrics", "events"), [({"train_loss": 0.5}, 1), (METRICS, 2)])
    def test_without_validation_it_does_not_measure_a_step_again(
        self, any_service: Service, metrics: Metrics, events: int
    ) -> None:
        lease = any_service.claim(any_service.add_job())
        record = JobProgress(any_service.sessions, lease)
        record.on_start(60)
        record.on_step(make_step(60))
        record.on_evaluation(Evaluated(step=60, metrics=metrics, file="step-60"), make_artifact())
        assert len(any_service.events(lease.job_id, "metrics")) == events

    def test_one_between_two_events_measures_its_step(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        record = JobProgress(service.sessions, lease)
        record.on_start(1000)
        record.on_step(make_step(7, total=1000))
        record.on_evaluation(Evaluated(step=7, metrics={"train_loss": 0.5}, file="step-7"), make_artifact())
        (event,) = service.events(lease.job_id, "metrics")
        assert event.message == "Step 7/1000: training loss=0.50"

    def test_a_repeated_write_changes_nothing(self, service: Service) -> None:
        record = JobProgress(service.sessions, service.claim(service.add_job()))
        for _ in range(2):
            record.on_evaluation(Evaluated(step=1, metrics={}, file="step-1"), make_artifact())

        assert len(service.checkpoints()) == len(service.adapters()) == 1

    def test_a_damaged_adapter_is_not_stored(self, service: Service) -> None:
        artifact = bytearray(make_artifact())
        artifact[-1] ^= 1
        record = JobProgress(service.sessions, service.claim(service.add_job()))

        with pytest.raises(DigestError):
            record.on_evaluation(Evaluated(step=1, metrics={}, file="step-1"), bytes(artifact))
        assert service.checkpoints() == service.adapters() == []


class TestSuccess:
    def test_everything_is_there_at_once(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job(), ttl=timedelta(minutes=1))
        artifact = make_artifact()

        results.succeed(any_service.sessions, lease, make_finished(artifact), storage=any_service.storage)

        job = any_service.job(lease.job_id)
        name = f"ft:tiny:{any_service.project.slug}:greeter:{job.id[-8:]}"
        assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("succeeded", name, 1234)
        assert (job.lease_owner, job.lease_until, job.estimated_finish) == (None, None, None)
        assert job.finished_at is not None
        (adapter,) = any_service.adapters()
        assert (adapter.id, adapter.checkpoint_step) == (name, None)
        with any_service.sessions() as session:
            assert session.merge(adapter).artifact == artifact
        assert any_service.messages(job.id) == [
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
        ]

    @pytest.mark.parametrize("suffix", [None, ""])
    def test_without_a_suffix_the_name_has_two_colons(self, service: Service, suffix: str | None) -> None:
        lease = service.claim(service.add_job(suffix=suffix))
        succeed(service, lease)
        assert service.adapters()[0].id == f"ft:tiny:{service.project.slug}::{lease.job_id[-8:]}"

    def test_a_commit_that_fails_leaves_nothing(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())

        def refuse(_: object) -> None:
            raise ConnectionError("the database is gone")

        event.listen(any_service.engine, "commit", refuse)
        try:
            with pytest.raises(ConnectionError):
                succeed(any_service, lease)
        finally:
            event.remove(any_service.engine, "commit", refuse)

        job = any_service.job(lease.job_id)
        assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("running", None, None)
        assert any_service.adapters() == []
        assert any_service.messages(job.id) == []
        assert stored_files(any_service) == [job.training_file]  # and no orphan
        succeed(any_service, lease)
        assert any_service.job(lease.job_id).status == "succeeded"

    def test_an_old_attempt_cannot_succeed(self, any_service: Service) -> None:
        job_id = any_service.add_job()
        old = any_service.claim(job_id, ttl=timedelta(seconds=-1))
        any_service.claim(job_id, owner="two")

        for end in (
            lambda: succeed(any_service, old),
            lambda: results.fail(any_service.sessions, old, INTERNAL),
            lambda: results.cancel(any_service.sessions, old),
            lambda: JobProgress(any_service.sessions, old).on_step(make_step(1)),
        ):
            with pytest.raises(LeaseLost):
                end()
        assert any_service.job(job_id).status == "running"
        assert any_service.job(job_id).progress is None
        assert any_service.adapters() == []

    def test_a_damaged_adapter_is_no_success(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        artifact = bytearray(make_artifact())
        artifact[-1] ^= 1

        with pytest.raises(DigestError):
            results.succeed(service.sessions, lease, make_finished(bytes(artifact)), storage=service.storage)
        assert service.job(lease.job_id).status == "running"

    def test_a_cancel_before_the_commit_wins(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        service.update(lease.job_id, cancel_requested=True)

        succeed(service, lease)

        assert service.job(lease.job_id).status == "cancelled"
        assert service.adapters() == []
        assert stored_files(service) == [service.job(lease.job_id).training_file]


class TestResultFile:
    def test_it_has_a_line_for_every_step_that_was_measured(self, any_service: Service) -> None:
        lease = any_service.claim(any_service.add_job())
        record = JobProgress(any_service.sessions, lease)
        record.on_start(60)
        for step in (make_step(1, loss=2.5), make_step(2, loss=None), make_step(3, loss=0.5)):
            record.on_step(step)
        measured = {"step": 3.0, "train_loss": 0.5, "valid_loss": 0.75, "valid_mean_token_accuracy": 0.625}
        record.on_evaluation(Evaluated(step=3, metrics=dict(measured), file="s"), make_artifact())
        succeed(any_service, lease)

        job = any_service.job(lease.job_id)
        (file_id,) = job.result_files
        with any_service.sessions() as session:
            file = session.execute(select(File).where(File.id == file_id)).scalar_one()
        content = any_service.storage.open(file.storage_key).read()
        assert (file.purpose, file.filename, file.bytes) == ("fine-tune-results", "step_metrics.csv", len(content))
        assert (file.project_id, file.sha256) == (job.project_id, hashlib.sha256(content).hexdigest())
        assert content.decode().splitlines() == [
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
            "1,2.5,0.75,,",
            "2,,0.75,,",
            "3,0.5,0.75,0.75,0.625",
        ]
        assert (job.best_step, job.stopped_early) == (3, True)

    def test_a_commit_whose_answer_was_lost_keeps_its_bytes(self, service: Service) -> None:
        """The commit came through, but the trainer was told otherwise."""
        lease = service.claim(service.add_job())

        class Forgetful(LocalStore):
            def write(self, *args: Any, **options: Any) -> StoredObject:
                stored = super().write(*args, **options)
                event.listen(service.engine, "commit", lose_answer, once=True)
                return stored

        def lose_answer(connection: Connection) -> None:
            connection.connection.driver_connection.execute("COMMIT")  # type: ignore[union-attr]
            raise ConnectionError("no answer")

        with pytest.raises(Exception, match=r"no answer|no transaction"):
            results.succeed(
                service.sessions,
                lease,
                make_finished(make_artifact()),
                storage=Forgetful(service.settings.storage_dir),
            )
        job = service.job(lease.job_id)
        assert job.status == "succeeded"
        assert set(stored_files(service)) == {job.training_file, *job.result_files}

    def test_accuracy_of_a_classification(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        record = JobProgress(service.sessions, lease)
        metrics: Metrics = {"train_loss": 0.5, "train_accuracy": 0.5, "valid_loss": 0.25, "valid_accuracy": 0.75}
        record.on_evaluation(Evaluated(step=4, metrics=metrics, file="s"), make_artifact())
        with service.sessions() as session:
            lines = measurements_csv(session, lease.job_id).decode().splitlines()

        assert lines[1:] == ["4,0.5,0.5,0.25,0.75"]


class TestBestStep:
    def test_it_has_the_lowest_validation_loss(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        record = JobProgress(service.sessions, lease)
        for step, loss in ((10, 0.9), (20, 0.4), (30, 0.4), (40, None)):
            record.on_evaluation(Evaluated(step=step, metrics={"valid_loss": loss}, file="s"), make_artifact())
        succeed(service, lease)

        assert service.job(lease.job_id).best_step == 20

    def test_without_validation_there_is_none(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        succeed(service, lease)
        assert service.job(lease.job_id).best_step is None


class TestFailure:
    def test_kind_goes_to_the_event_and_the_rest_to_the_job(self, service: Service) -> None:
        lease = service.claim(service.add_job())
        results.fail(service.sessions, lease, INTERNAL)

        job = service.job(lease.job_id)
        assert job.error == {"code": "internal_error", "message": INTERNAL.message, "param": None}
        (event,) = service.events(job.id, "message")
        assert (event.level, event.data) == (
            "error",
            {"kind": "platform", "code": "internal_error", "param": None},
        )
