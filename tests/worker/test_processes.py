"""The real commands: sweeper and trainer, on each broker, started, stopped and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from api.caller import Caller
from api.database import now
from api.jobs import service as jobs
from api.jobs.models import JobStatus
from api.jobs.repository import state_step
from api.queue import CeleryQueue, TaskName
from api.settings import Settings
from api.unit_of_work import open_unit_of_work
from tests.api.support import empty_broker
from tests.worker.support import BASE_MODEL, Service, chat_rows, tail, wait_until
from uora.spec import TrainingOptions
from worker.progress import is_event_due

#: As in the Procfile and in docker-compose.yml.
COMMANDS = {
    "trainer": ["worker", "-Q", "training", "-n", "trainer@%h"],
    "sweeper": ["worker", "-B", "-Q", "files,maintenance", "-n", "sweeper@%h"],
}
PATIENCE_SECONDS = 90.0


class Processes:
    """Workers of one service, and their logs."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self._folder = folder
        #: Where work folders of trainings lie.
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *, spare: bool = False) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", *COMMANDS[name], "-l", "INFO"]
        log = self._log(name)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, env=self._environment(spare), stdout=output, stderr=output, start_new_session=True
            )
        self._started.append(process)
        wait_until(lambda: " ready." in tail(log), what=f"the start of the {name}", seconds=30)
        return process

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{tail(self._log(name))}" for name in COMMANDS)

    def wait_for(self, job_id: str, status: JobStatus) -> None:
        try:
            wait_until(
                lambda: self.service.job(job_id).status == status, what=f"{job_id} {status}", seconds=PATIENCE_SECONDS
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.service.job(job_id).status}\n{self.logs()}") from None

    def wait_for_steps(self, job_id: str) -> None:
        def has_steps() -> bool:
            progress = self.service.job(job_id).progress
            return progress is not None and progress["step"] > 0

        wait_until(has_steps, what=f"steps of {job_id}\n{self.logs()}", seconds=PATIENCE_SECONDS)

    def wait_until_tidy(self) -> None:
        """A job's end is recorded before its work folder is removed."""
        wait_until(lambda: not any(self.temporary.iterdir()), what="the end of work folders", seconds=5)

    def close(self) -> None:
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _environment(self, spare: bool) -> dict[str, str]:
        settings = self.service.settings
        return os.environ | {
            "UORA_HOME": str(settings.home),
            "UORA_DATABASE_URL": settings.database_url,
            "UORA_BROKER_URL": settings.broker_url,
            "UORA_CACHE_DIR": str(settings.cache_dir),
            "UORA_BASE_MODELS": f'{{"{BASE_MODEL}": "{settings.base_models[BASE_MODEL]}"}}',
            "UORA_ENGINE_TOKEN": settings.engine_token.get_secret_value(),
            "UORA_DTYPE": "float32",
            "UORA_TORCH_THREADS": "1",
            "UORA_LEASE_TTL": "PT4S",
            "UORA_HEARTBEAT_INTERVAL": "PT0.5S",
            "UORA_SWEEP_INTERVAL": "PT1S",
            "UORA_SPARE_TRAINER": str(spare),
            "TMPDIR": str(self.temporary),
        }


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with empty_broker() as url:
        yield url


EMBEDDED = "embedded"
SERVERS = pytest.param("servers", marks=pytest.mark.postgres)


@pytest.fixture(scope="module")
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Processes]:
    """A sweeper on SQLite and a folder, and on PostgreSQL and Redis."""
    folder = tmp_path_factory.mktemp("processes")
    servers = request.param != EMBEDDED
    settings = Settings(
        _env_file=None,
        home=folder / "home",
        cache_dir=folder / "cache",
        database_url=request.getfixturevalue("postgres_url") if servers else "",
        broker_url=request.getfixturevalue("redis_url") if servers else "",
        engine_token=SecretStr("engine-secret"),
        base_models={BASE_MODEL: f"path:{tiny_model}"},
    )
    settings.home.mkdir()
    service = Service(settings)
    processes = Processes(service, folder)
    try:
        processes.start("sweeper")
        yield processes
    finally:
        processes.close()
        service.close()


def long_job(service: Service) -> str:
    """Hundreds of steps: seconds."""
    return service.add_job(rows=64, n_epochs=20, training_options=TrainingOptions(save_steps=10))


def kept_step(service: Service, job_id: str) -> int:
    with service.sessions() as session:
        return state_step(session, job_id) or 0


def assert_went_on(service: Service, job_id: str) -> None:
    """Every step of `long_job` that is told is told once, up to the last."""
    assert service.job(job_id).status == "succeeded"
    events = [event.data or {} for event in service.events(job_id, "metrics")]
    steps = [data["step"] for data in events if "trained_tokens" in data]
    assert steps == [step for step in range(1, 641) if is_event_due(step, total_steps=640)]
    resumed = [message for message in service.messages(job_id) if message.startswith("Resuming from step ")]
    assert len(resumed) == service.job(job_id).attempt - 1


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


@pytest.mark.parametrize("processes", [EMBEDDED, SERVERS], indirect=True)
def test_a_job_from_its_first_message_to_its_model(processes: Processes) -> None:
    service = processes.service
    trainer = processes.start("trainer")
    rows = chat_rows(4)
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, rows=8, n_epochs=2, validation=rows)
    CeleryQueue(service.settings).send(TaskName.VALIDATE, job_id)
    processes.wait_for(job_id, JobStatus.SUCCEEDED)

    job = service.job(job_id)
    adapters = [adapter for adapter in service.adapters() if adapter.job_id == job_id]
    name = job.fine_tuned_model
    assert [adapter.id for adapter in adapters] == [f"{name}:ckpt-step-4", f"{name}:ckpt-step-8", name]
    assert [row.step_number for row in service.checkpoints() if row.job_id == job_id] == [4, 8]
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0
    assert [
        event.data["step"]
        for event in service.events(job_id, "metrics")
        if event.data and "learning_rate" in event.data
    ] == [*range(1, 9)]
    validating, training, validation, *rest = service.messages(job_id)
    assert training.startswith("The training file has 8 rows")
    assert validation.startswith("The validation file has 4 rows")
    assert [validating, *rest] == [
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Checkpoint created at step 4",
        "Checkpoint created at step 8",
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]
    processes.wait_until_tidy()
    trainer.terminate()
    assert trainer.wait(timeout=15) == 0, processes.logs()


@pytest.mark.parametrize("processes", [SERVERS], indirect=True)
def test_jobs_that_wait_are_trained_together(processes: Processes) -> None:
    service = processes.service
    jobs_ = [service.add_job(status=JobStatus.VALIDATING_FILES, rows=64, n_epochs=epochs) for epochs in (1, 8, 8)]
    for job_id in jobs_:
        CeleryQueue(service.settings).send(TaskName.VALIDATE, job_id)
    for job_id in jobs_:
        processes.wait_for(job_id, JobStatus.QUEUED)
    trainer = processes.start("trainer")
    short, *long = jobs_
    processes.wait_for(short, JobStatus.SUCCEEDED)
    assert [service.job(job_id).status for job_id in long] == ["running"] * 2
    (child,) = children(trainer)
    service.update(long[0], cancel_requested=True)
    processes.wait_for(long[0], JobStatus.CANCELLED)
    assert child.is_running()
    processes.wait_for(long[1], JobStatus.SUCCEEDED)

    wait_until(lambda: CeleryQueue(service.settings).waiting(TaskName.TRAIN) == 0, what="their messages", seconds=10)
    assert [service.job(job_id).attempt for job_id in jobs_] == [1, 1, 1]
    results = [adapter.job_id for adapter in service.adapters() if adapter.checkpoint_step is None]
    assert [job_id for job_id in results if job_id in jobs_] == [short, long[1]]
    processes.wait_until_tidy()
    trainer.terminate()
    assert trainer.wait(timeout=15) == 0, processes.logs()


@pytest.mark.parametrize("processes", [EMBEDDED], indirect=True)
def test_a_lost_message_and_a_killed_trainer_are_replaced(processes: Processes) -> None:
    service = processes.service
    trainer = processes.start("trainer")
    long_ago = now() - timedelta(minutes=1)
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, n_epochs=20, created_at=long_ago)
    processes.wait_for_steps(job_id)
    (child,) = children(trainer)
    trainer.kill()
    trainer.wait()

    wait_until(lambda: not child.is_running(), what="the end of the training child", seconds=5)
    processes.wait_until_tidy()
    assert service.job(job_id).status == "running"
    second = processes.start("trainer")
    processes.wait_for(job_id, JobStatus.SUCCEEDED)
    job = service.job(job_id)
    assert (job.attempt, job.lost_trainers) == (2, 0)  # the second got further
    steps = [row.step_number for row in service.checkpoints() if row.job_id == job_id]
    assert steps == [8 * number for number in range(1, 11)]
    second.terminate()
    assert second.wait(timeout=15) == 0, processes.logs()


@pytest.mark.parametrize("processes", [SERVERS], indirect=True)
def test_cancel_and_shutdown(processes: Processes) -> None:
    service = processes.service
    trainer = processes.start("trainer")
    cancelled, released = long_job(service), long_job(service)
    processes.wait_for_steps(cancelled)
    service.update(cancelled, cancel_requested=True)
    wait_until(lambda: service.job(cancelled).status == "cancelled", what="the cancel", seconds=5)

    wait_until(lambda: kept_step(service, released), what="steps of the next job", seconds=PATIENCE_SECONDS)
    trainer.terminate()
    assert trainer.wait(timeout=15) == 0, processes.logs()
    job = service.job(released)
    assert (job.status, job.lost_trainers) == ("queued", 0)
    processes.wait_until_tidy()

    second = processes.start("trainer")
    processes.wait_for(released, JobStatus.SUCCEEDED)
    assert_went_on(service, released)
    second.terminate()
    assert second.wait(timeout=15) == 0, processes.logs()


@pytest.mark.parametrize("processes", [EMBEDDED], indirect=True)  # on servers: tests/e2e/test_service.py
def test_pause_and_resume(processes: Processes) -> None:
    service = processes.service
    user = Caller(project_id=service.project.id, project_slug=service.project.slug, key_id="key")
    trainer = processes.start("trainer", spare=True)
    job_id = long_job(service)
    processes.wait_for_steps(job_id)
    with service.sessions.begin() as session:
        jobs.pause(session, user, job_id)
    processes.wait_for(job_id, JobStatus.PAUSED)
    wait_until(lambda: len(children(trainer)) == 1, what="a spare child alone", seconds=10)
    (spare,) = children(trainer)
    assert kept_step(service, job_id) > 0
    processes.wait_until_tidy()

    with open_unit_of_work(service.sessions, CeleryQueue(service.settings)) as work:
        jobs.resume(work, user, job_id)
    processes.wait_for(job_id, JobStatus.SUCCEEDED)
    assert_went_on(service, job_id)
    assert not spare.is_running()  # it was used
    wait_until(lambda: children(trainer), what="the next spare", seconds=10)
    (spare,) = children(trainer)
    trainer.terminate()
    assert trainer.wait(timeout=15) == 0, processes.logs()
    wait_until(lambda: not spare.is_running(), what="the end of the spare", seconds=5)


@pytest.mark.parametrize("processes", [EMBEDDED], indirect=True)
def test_a_killed_trainer_costs_no_kept_step(processes: Processes) -> None:
    service = processes.service
    trainer = processes.start("trainer")
    job_id = long_job(service)
    wait_until(lambda: kept_step(service, job_id), what="a state", seconds=PATIENCE_SECONDS)
    trainer.kill()
    trainer.wait()
    kept = kept_step(service, job_id)

    second = processes.start("trainer")
    processes.wait_for(job_id, JobStatus.SUCCEEDED)
    assert_went_on(service, job_id)
    assert f"Resuming from step {kept}" in service.messages(job_id)
    second.terminate()
    assert second.wait(timeout=15) == 0, processes.logs()


@pytest.mark.parametrize("processes", [EMBEDDED], indirect=True)
def test_a_killed_child_fails_its_job_and_not_the_trainer(processes: Processes) -> None:
    service = processes.service
    trainer = processes.start("trainer")
    killed, without_file = long_job(service), service.add_job()
    service.storage.delete(service.job(without_file).training_file)
    wait_until(lambda: kept_step(service, killed), what="a state", seconds=PATIENCE_SECONDS)
    children(trainer)[0].kill()
    processes.wait_for(killed, JobStatus.FAILED)

    error = service.job(killed).error
    assert error is not None
    assert error["code"] == "out_of_memory_or_killed"
    processes.wait_for(without_file, JobStatus.FAILED)

    user = Caller(project_id=service.project.id, project_slug=service.project.slug, key_id="key")
    with open_unit_of_work(service.sessions, CeleryQueue(service.settings)) as work:
        jobs.resume(work, user, killed)
    processes.wait_for(killed, JobStatus.SUCCEEDED)
    assert_went_on(service, killed)
    trainer.terminate()
    assert trainer.wait(timeout=15) == 0, processes.logs()


@pytest.mark.parametrize("processes", [EMBEDDED], indirect=True)
def test_beat_ends_with_a_killed_sweeper(processes: Processes) -> None:
    sweeper = processes.start("sweeper")
    (beat,) = children(sweeper)
    sweeper.kill()
    sweeper.wait()

    wait_until(lambda: not beat.is_running(), what="the end of the beat process", seconds=5)
