"""Watching a job to its end: what is shown, across a restart of the service, and when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from api.database import make_engine, make_sessions, now
from api.jobs.models import Job, JobStatus
from api.jobs.repository import add_event
from scripts.demo import free_port
from tests.api.rows import add_job
from tests.api.support import NO_TLS, ROOT, Service, Tenant, make_tenant, migrate, wait_until
from tests.cli.conftest import Run

Sessions = sessionmaker[Session]


def running_job(sessions: Sessions, tenant: Tenant) -> str:
    with sessions.begin() as session:
        return add_job(session, tenant, status=JobStatus.RUNNING).id


def tell(sessions: Sessions, job_id: str, *messages: str, **values: object) -> None:
    """Write events, and change the job with them."""
    with sessions.begin() as session:
        for message in messages:
            add_event(session, job_id, message=message)
        if values:
            session.query(Job).filter_by(id=job_id).update(values)


def end(sessions: Sessions, job_id: str, status: JobStatus) -> None:
    tell(sessions, job_id, "the end", status=status, finished_at=now(), fine_tuned_model="ft:tiny:x::y")


@contextmanager
def watching(url: str, key: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """``uora jobs watch`` in a process of its own, and the file with all that it prints."""
    said = Path(os.environ["XDG_CONFIG_HOME"] + ".said")
    environment = os.environ | {"UORA_BASE_URL": url, "UORA_API_KEY": key}
    with said.open("w") as output:
        command = [sys.executable, "-m", "cli", "jobs", "watch", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True)
        try:
            yield process, said
        finally:
            process.kill()
            process.wait()


def events_of(text: str) -> list[str]:
    """The events in what was printed, which have their time before them."""
    return re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("status", "exit_code"), [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 1), (JobStatus.CANCELLED, 1)]
)
def test_the_status_at_the_end(uora: Run, service: Service, status: JobStatus, exit_code: int) -> None:
    job_id = running_job(service.sessions, service.tenant)
    progress = {"step": 3, "total_steps": 10, "train_loss": 1.25, "tokens_per_second": 5000.4, "seconds_left": 12.0}
    tell(service.sessions, job_id, *(f"event {number}" for number in range(150)), progress=progress)
    end(service.sessions, job_id, status)
    done = uora("jobs", "watch", job_id)
    assert done.exit_code == exit_code, done.output
    assert events_of(done.stdout) == [*(f"event {number}" for number in range(150)), "the end"]
    assert f"{status}: step 3/10, loss 1.25, 5,000 tokens/s, 12 s left\n" in done.stdout
    assert ("`uora chat ft:tiny:x::y`" in done.stderr) == (exit_code == 0)


def test_the_last_events_only(uora: Run, service: Service) -> None:
    job_id = running_job(service.sessions, service.tenant)
    tell(service.sessions, job_id, "first", "second")
    end(service.sessions, job_id, JobStatus.SUCCEEDED)
    assert events_of(uora("jobs", "watch", job_id, "--tail", "2").stdout) == ["second", "the end"]
    assert events_of(uora("jobs", "watch", job_id, "--tail", "0").stdout) == []


def test_ctrl_c_leaves_the_job_alone(config: Path, service: Service) -> None:
    job_id = running_job(service.sessions, service.tenant)
    tell(service.sessions, job_id, "begun")
    with watching(service.url, service.tenant.key, job_id) as (process, said):
        wait_until(lambda: "begun" in said.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert f"The job goes on. `uora jobs watch {job_id}` watches it again" in said.read_text()
    with service.sessions() as session:
        assert session.query(Job).filter_by(id=job_id).one().status == JobStatus.RUNNING


@dataclass
class Server:
    """The api in a process of its own, on the same port after each start."""

    url: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", "--log-level", "warning"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment)
        wait_until(self.answers, seconds=60)

    def kill(self) -> None:
        """Without a last word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", verify=NO_TLS).status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UORA_")} | {
        "UORA_HOME": str(tmp_path / "home"),
        "UORA_DATABASE_URL": f"sqlite:///{tmp_path / 'uora.db'}",
        "UORA_BASE_MODELS": '{"tiny": "path:/nowhere"}',
        "UORA_ENGINE_TOKEN": "token",
        "UVICORN_PORT": str(port),
    }
    server = Server(f"http://127.0.0.1:{port}", environment)
    yield server
    if server.process is not None:
        server.kill()


@pytest.fixture
def own_database(tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path / 'uora.db'}"
    migrate(url)
    engine = make_engine(url)
    yield engine
    engine.dispose()


def test_a_restart_of_the_service_loses_and_repeats_nothing(config: Path, server: Server, own_database: Engine) -> None:
    """Killed in the middle of a wait; events come before, while it is away, and after."""
    sessions = make_sessions(own_database)
    with sessions.begin() as session:
        tenant = make_tenant(session, "Acme")
    job_id = running_job(sessions, tenant)
    tell(sessions, job_id, "before 1", "before 2")
    server.start()
    with watching(server.url, tenant.key, job_id) as (process, said):
        wait_until(lambda: "before 2" in said.read_text())
        server.kill()
        tell(
            sessions, job_id, *(f"while away {number}" for number in range(120)), progress={"step": 1, "total_steps": 2}
        )
        wait_until(lambda: "trying again" in said.read_text())
        server.start()
        wait_until(lambda: "while away 119" in said.read_text())
        tell(sessions, job_id, "after", progress={"step": 2, "total_steps": 2})
        wait_until(lambda: "after" in said.read_text())
        time.sleep(0.3)  # into the next wait
        end(sessions, job_id, JobStatus.SUCCEEDED)
        assert process.wait(30) == 0, said.read_text()
    text = said.read_text()
    away = [f"while away {number}" for number in range(120)]
    assert events_of(text) == ["before 1", "before 2", *away, "after", "the end"]
    assert text.count("The service does not answer; trying again ...") == 1
    assert text.count("The service answers again.") == 1


def test_a_terminal_has_a_bar(config: Path, service: Service) -> None:
    """On a real terminal: events go by above the bar, which has the loss, the speed and the time left."""
    job_id = running_job(service.sessions, service.tenant)
    progress = {"step": 3, "total_steps": 10, "train_loss": 1.25, "tokens_per_second": 5000.0, "seconds_left": 12.0}
    tell(service.sessions, job_id, "begun", progress={**progress})
    environment = os.environ | {"UORA_BASE_URL": service.url, "UORA_API_KEY": service.tenant.key}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "24"}
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "cli", "jobs", "watch", job_id]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while b"12 s left" not in shown:
            shown += os.read(ours, 65536)
        end(service.sessions, job_id, JobStatus.FAILED)
        while b"failed" not in shown:
            shown += os.read(ours, 65536)
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert "  begun" in plain
    assert "step 3/10, loss 1.25, 5,000 tokens/s, 12 s left" in plain
