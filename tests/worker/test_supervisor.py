"""The parent's side of a training: heartbeats, stops, and children that end in every way a process can."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from api.database import now
from api.jobs.models import JobStatus
from tests.worker.artifacts import make_artifact
from tests.worker.support import BASE_MODEL, Service, wait_until
from worker import child_process, memory, supervisor
from worker.child_process import child_environment
from worker.context import Resources
from worker.lease import Sessions
from worker.supervisor import Interrupted, patiently
from worker.tasks.training import record, train

#: A child says what it was told to say; ``say``, ``request`` and ``save`` are all that it knows.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
request = json.loads(sys.stdin.readline())
os.chdir(request['runs'][0]['work_dir'])
def say(**report): print(json.dumps(report), flush=True)
def save(name): Path(name).write_bytes(bytes.fromhex(ARTIFACT))
Path(PID_FILE).write_text(str(os.getpid()))
RESULT = dict(trained_tokens=9, steps=1, hits=0, metrics={}, stopped_early=False)
def done(): save('final'); say(type='done', file='final', **RESULT)
"""

UseChild = Callable[[str], Path]


@pytest.fixture
def held(service: Service) -> Resources:
    return service.resources(
        lease_ttl=timedelta(seconds=2), stop_grace=timedelta(seconds=0.5), base_models={BASE_MODEL: "path:/nowhere"}
    )


@pytest.fixture
def use_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> UseChild:
    """Replaces ``python -m worker.child`` by a script; answers the file that will hold its process id."""

    def use(script: str) -> Path:
        pid_file = tmp_path / "child.pid"
        constants = f"ARTIFACT = {make_artifact().hex()!r}\nPID_FILE = {str(pid_file)!r}\n"
        command = (sys.executable, "-c", constants + PRELUDE + textwrap.dedent(script))
        monkeypatch.setattr(child_process, "COMMAND", command)
        return pid_file

    return use


def pid_of(pid_file: Path) -> int:
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), what="the child's start", seconds=15)
    return int(pid_file.read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def train_in_background(held: Resources, job_id: str) -> threading.Thread:
    thread = threading.Thread(target=train, args=(held, job_id))
    thread.start()
    return thread


class TestEnd:
    def test_success(self, service: Service, held: Resources, use_child: UseChild) -> None:
        use_child("say(type='started', total_steps=1); done()")
        job_id = service.add_job()

        train(held, job_id)

        assert service.job(job_id).status == "succeeded"
        assert len(service.adapters()) == 1

    def test_what_is_not_a_report_is_passed_over(
        self, service: Service, held: Resources, use_child: UseChild, caplog: pytest.LogCaptureFixture
    ) -> None:
        use_child("print('Downloading... 50%'); print('{\"type\": \"odd\"}'); done()")
        job_id = service.add_job()
        train(held, job_id)

        assert service.job(job_id).status == "succeeded"
        assert "Downloading" in caplog.text

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ("os.kill(os.getpid(), signal.SIGKILL)", "out_of_memory_or_killed"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", "internal_error"),
            ("sys.exit(3)", "internal_error"),
            ("sys.exit(0)", "internal_error"),
            ("os.close(1); time.sleep(60)", "internal_error"),  # hangs at its end, and is killed by us
        ],
    )
    def test_a_child_that_ends_without_a_result(
        self, service: Service, held: Resources, use_child: UseChild, script: str, code: str
    ) -> None:
        use_child(script)
        job_id = service.add_job()

        train(held, job_id)

        job = service.job(job_id)
        assert job.error is not None
        assert (job.status, job.error["code"]) == ("failed", code)
        assert service.adapters() == []

    def test_a_killed_child_tells_how_much_memory_it_had(
        self, service: Service, held: Resources, use_child: UseChild
    ) -> None:
        use_child("kept = bytearray(os.urandom(2**20) * 600); time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)")
        job_id = service.add_job()
        train(held, job_id)

        error = service.job(job_id).error
        assert error is not None
        found = re.search(r"seen with ([0-9.]+) GiB of the ([0-9.]+) GiB", error["message"])
        assert found is not None
        assert float(found[1]) >= 0.6
        assert float(found[2]) == pytest.approx(memory.total_bytes() / 2**30, abs=0.1)
        assert "batch_size" in error["message"]

    def test_a_sigterm_from_elsewhere_gives_the_job_back(
        self, service: Service, held: Resources, use_child: UseChild
    ) -> None:
        """A service manager ends all processes of its group at once; the child may be the first to go."""
        use_child("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
        job_id = service.add_job()
        train(held, job_id)

        assert (service.job(job_id).status, service.job(job_id).error) == ("queued", None)

    def test_the_end_of_stderr_goes_to_the_log_and_not_to_the_user(
        self, service: Service, held: Resources, use_child: UseChild, caplog: pytest.LogCaptureFixture
    ) -> None:
        use_child("print('line of the child: hunter2', file=sys.stderr); sys.exit(1)")
        job_id = service.add_job()
        train(held, job_id)

        assert "line of the child: hunter2" in caplog.text
        assert "hunter2" not in json.dumps(service.job(job_id).error) + str(service.messages(job_id))

    def test_a_reported_failure_is_stored_as_it_is(
        self, service: Service, held: Resources, use_child: UseChild
    ) -> None:
        use_child("say(type='failed', failure=dict(kind='user', code='training_diverged', message='m', param='p'))")
        job_id = service.add_job()
        train(held, job_id)

        assert service.job(job_id).error == {"code": "training_diverged", "message": "m", "param": "p"}

    @pytest.mark.parametrize("file", ["missing", "../../outside"])
    def test_a_result_that_is_not_there(
        self, service: Service, held: Resources, use_child: UseChild, file: str
    ) -> None:
        use_child(f"say(type='done', file={file!r}, **RESULT)")
        job_id = service.add_job()
        train(held, job_id)

        error = service.job(job_id).error
        assert error is not None
        assert error["code"] == "internal_error"

    def test_a_result_that_is_damaged(
        self, service: Service, held: Resources, use_child: UseChild, caplog: pytest.LogCaptureFixture
    ) -> None:
        use_child("ARTIFACT = ARTIFACT[:-2] + '77'; done()")
        job_id = service.add_job()
        train(held, job_id)

        error = service.job(job_id).error
        assert error is not None
        assert error["code"] == "internal_error"
        assert "digest" in caplog.text
        assert service.adapters() == []

    def test_the_work_folder_is_gone(
        self, service: Service, held: Resources, use_child: UseChild, tmp_path: Path
    ) -> None:
        use_child(f"Path({str(tmp_path)!r}, 'where').write_text(os.getcwd()); done()")
        train(held, service.add_job())

        assert not Path((tmp_path / "where").read_text()).exists()

    def test_a_stored_file_that_is_gone(self, service: Service, held: Resources, use_child: UseChild) -> None:
        pid_file = use_child("done()")
        job_id = service.add_job()
        service.storage.delete(service.job(job_id).training_file)
        train(held, job_id)

        assert service.job(job_id).status == "failed"
        assert not pid_file.exists()


class TestStop:
    @pytest.mark.parametrize("script", ["time.sleep(60)", "signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
    def test_cancel_ends_even_a_child_that_ignores_sigterm(
        self, service: Service, held: Resources, use_child: UseChild, script: str
    ) -> None:
        pid_file = use_child(script)
        job_id = service.add_job()
        thread = train_in_background(held, job_id)
        pid = pid_of(pid_file)
        began = time.monotonic()
        service.update(job_id, cancel_requested=True)
        thread.join(timeout=10)

        assert time.monotonic() - began < 5
        assert not is_alive(pid)
        assert service.job(job_id).status == "cancelled"
        assert service.messages(job_id) == ["Cancelled"]

    def test_what_the_child_started_ends_with_it(
        self, service: Service, held: Resources, use_child: UseChild, tmp_path: Path
    ) -> None:
        grandchild = tmp_path / "grandchild"
        use_child(
            f"""
            import subprocess
            Path({str(grandchild)!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
            done()
            """
        )
        train(held, service.add_job())

        pid = int(grandchild.read_text())
        wait_until(lambda: not is_alive(pid) or _is_zombie(pid), what="the end of the grandchild", seconds=5)

    def test_shutdown_gives_the_job_back(self, service: Service, held: Resources, use_child: UseChild) -> None:
        pid_file = use_child("time.sleep(60)")
        job_id = service.add_job()
        thread = train_in_background(held, job_id)
        pid = pid_of(pid_file)
        held.stopping.set()
        thread.join(timeout=5)

        job = service.job(job_id)
        assert not is_alive(pid)
        assert (job.status, job.lease_owner, job.lost_trainers) == ("queued", None, 0)

    def test_a_cancel_during_the_shutdown_is_not_forgotten(self, service: Service, held: Resources) -> None:
        job_id = service.add_job()
        lease = service.claim(job_id)
        service.update(job_id, cancel_requested=True)

        record(held, lease, Interrupted())

        assert service.job(job_id).status == "cancelled"

    def test_a_worker_that_leaves_claims_nothing(self, service: Service, held: Resources) -> None:
        held.stopping.set()
        job_id = service.add_job()
        train(held, job_id)

        assert service.job(job_id).status == "queued"

    @pytest.mark.parametrize(
        "script", ["time.sleep(60)", "time.sleep(1.5); say(type='started', total_steps=1); done()"]
    )
    def test_a_job_that_somebody_took_over_is_not_written_to(
        self, service: Service, held: Resources, use_child: UseChild, script: str
    ) -> None:
        pid_file = use_child(script)
        job_id = service.add_job()
        thread = train_in_background(held, job_id)
        pid = pid_of(pid_file)
        service.update(job_id, attempt=2, lease_owner="two")
        thread.join(timeout=10)

        assert not is_alive(pid)
        assert (service.job(job_id).status, service.job(job_id).lease_owner) == ("running", "two")
        assert service.messages(job_id) == []

    def test_a_second_message_leaves_the_running_job_alone(
        self, service: Service, held: Resources, use_child: UseChild
    ) -> None:
        pid_file = use_child("time.sleep(2); done()")
        job_id = service.add_job()
        thread = train_in_background(held, job_id)
        pid_of(pid_file)
        train(service.resources(), job_id)
        assert service.job(job_id).attempt == 1
        thread.join(timeout=15)

        assert (service.job(job_id).status, service.job(job_id).attempt) == ("succeeded", 1)


class TestHeartbeat:
    def test_a_silent_child_keeps_its_lease(self, service: Service, use_child: UseChild) -> None:
        ttl = timedelta(seconds=1)
        held = service.resources(lease_ttl=ttl, base_models={BASE_MODEL: "path:/nowhere"})
        pid_file = use_child("time.sleep(2.5); done()")
        job_id = service.add_job()
        thread = train_in_background(held, job_id)
        pid_of(pid_file)
        left = []
        while service.job(job_id).status == JobStatus.RUNNING:
            until = service.job(job_id).lease_until
            if until is not None:
                left.append(until - now())
            time.sleep(0.1)
        thread.join(timeout=10)

        assert service.job(job_id).status == "succeeded"
        assert len(left) > 10
        assert min(left) > timedelta(0)


class TestDatabaseOutage:
    def test_a_short_one_costs_nothing(
        self, service: Service, held: Resources, use_child: UseChild, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_child("say(type='started', total_steps=1); time.sleep(1); done()")
        renew, failures_left = supervisor.renew, 3

        def flaky(*args: object, **kwargs: object) -> object:
            nonlocal failures_left
            if failures_left:
                failures_left -= 1
                raise OperationalError("UPDATE", {}, Exception("restarting"))
            return renew(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(supervisor, "renew", flaky)
        job_id = service.add_job()
        train(held, job_id)

        assert failures_left == 0
        assert service.job(job_id).status == "succeeded"

    def test_patience_ends_with_the_lease(self) -> None:
        calls = 0

        def fail() -> None:
            nonlocal calls
            calls += 1
            raise OperationalError("UPDATE", {}, Exception("gone"))

        with pytest.raises(OperationalError):
            patiently(fail, patience=timedelta(seconds=0.5))
        assert calls > 1

    def test_a_long_one_stops_the_child(
        self, service: Service, held: Resources, use_child: UseChild, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pid_file = use_child("time.sleep(60)")

        def fail(sessions: Sessions, *_: object, **__: object) -> None:
            pid_of(pid_file)
            raise OperationalError("UPDATE", {}, Exception("gone"))

        monkeypatch.setattr(supervisor, "renew", fail)
        job_id = service.add_job()
        with pytest.raises(OperationalError):
            train(held, job_id)

        assert not is_alive(pid_of(pid_file))
        assert service.job(job_id).status == "running"  # for the sweeper, when the lease has run out


class TestEnvironment:
    def test_has_no_settings_and_no_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        secret = ("UORA_DATABASE_URL", "UORA_ENGINE_TOKEN", "DATABASE_URL", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY")
        for name in secret:
            monkeypatch.setenv(name, "hunter2")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

        environment = child_environment()

        assert "hunter2" not in environment.values()
        assert environment["CUDA_VISIBLE_DEVICES"] == "1"
        assert environment["PATH"] == os.environ["PATH"]

    def test_the_request_has_no_secrets_either(
        self, service: Service, held: Resources, use_child: UseChild, tmp_path: Path
    ) -> None:
        seen = tmp_path / "seen"
        use_child(f"Path({str(seen)!r}).write_text(json.dumps([request, dict(os.environ)])); done()")
        train(held, service.add_job())

        text = seen.read_text()
        assert held.settings.engine_token.get_secret_value() not in text
        assert held.settings.database_url not in text
        assert "sqlite" not in text


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
