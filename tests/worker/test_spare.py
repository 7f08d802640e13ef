"""The child that waits for the next job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from tests.worker import fake_training
from tests.worker.support import Service, wait_until
from worker import child_process
from worker.child_process import ChildProcess
from worker.context import Resources
from worker.spare import SpareChild
from worker.tasks.training import train


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "COMMAND", fake_training.COMMAND)


@pytest.fixture
def held(service: Service) -> Iterator[Resources]:
    """A trainer that keeps a spare."""
    held = service.resources(spare_trainer=True)
    yield held
    held.spare.close()


def assert_succeeded(service: Service, *job_ids: str) -> None:
    assert [service.job(job_id).status for job_id in job_ids] == ["succeeded"] * len(job_ids)


@pytest.mark.usefixtures("_fast")
class TestJobs:
    def test_each_takes_the_spare_of_the_one_before(
        self, service: Service, held: Resources, started: list[ChildProcess]
    ) -> None:
        jobs = [service.add_job() for _ in range(3)]
        for number, job_id in enumerate(jobs, start=1):
            train(held, job_id)
            assert [child.is_alive for child in started] == [*[False] * number, True]

        assert_succeeded(service, *jobs)

    def test_none_is_started_while_one_trains(
        self, service: Service, held: Resources, started: list[ChildProcess]
    ) -> None:
        job_id = service.add_job(rows=40)
        thread = threading.Thread(target=train, args=(held, job_id))
        thread.start()
        wait_until(lambda: (service.job(job_id).progress or {"step": 0})["step"] > 2, what="steps")
        during = len(started)
        thread.join(timeout=30)

        assert (during, len(started)) == (1, 2)

    def test_one_that_died_is_replaced(self, service: Service, held: Resources, started: list[ChildProcess]) -> None:
        held.spare.refill()
        os.kill(started[0].pid, signal.SIGKILL)
        wait_until(lambda: not started[0].is_alive, what="its end")
        job_id = service.add_job()
        train(held, job_id)

        assert_succeeded(service, job_id)
        assert len(started) == 3  # the dead one, the job's, the new spare

    def test_a_failed_one_has_a_successor_too(
        self, service: Service, held: Resources, started: list[ChildProcess]
    ) -> None:
        job_id = service.add_job()
        service.storage.delete(service.job(job_id).training_file)
        train(held, job_id)

        assert service.job(job_id).status == "failed"
        assert [child.is_alive for child in started] == [True]

    def test_without_the_setting_there_is_none(self, service: Service, started: list[ChildProcess]) -> None:
        job_id = service.add_job()
        train(service.resources(spare_trainer=False), job_id)

        assert_succeeded(service, job_id)
        assert [child.is_alive for child in started] == [False]

    def test_a_trainer_that_leaves_has_none(
        self, service: Service, held: Resources, started: list[ChildProcess]
    ) -> None:
        job_id = service.add_job(rows=40)
        thread = threading.Thread(target=train, args=(held, job_id))
        thread.start()
        wait_until(lambda: service.job(job_id).progress, what="the first step")
        held.stopping.set()
        thread.join(timeout=30)

        assert service.job(job_id).status == "queued"
        assert [child.is_alive for child in started] == [False]

    def test_one_that_waits_ends_when_its_trainer_leaves(self, held: Resources, started: list[ChildProcess]) -> None:
        held.spare.refill()
        held.stopping.set()
        wait_until(lambda: not started[0].is_alive, what="its end", seconds=5)
        held.spare.refill()

        assert len(started) == 1


class TestRealChild:
    def test_its_imports_leave_cuda_alone(self) -> None:
        """bitsandbytes, which peft imports, asks CUDA for its devices."""
        script = (
            "import sys, torch; from uora.imports import PutOff; from worker import child\n"
            "child._import()\n"
            "assert 'uora.training' in sys.modules and not torch.cuda.is_initialized()\n"
            "assert isinstance(sys.modules.get('bitsandbytes', PutOff('')), PutOff)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def test_it_imports_what_a_training_needs_and_goes_with_its_parent(self) -> None:
        spare = SpareChild(threading.Event())
        spare.refill()
        child = spare.take()
        process = psutil.Process(child.pid)
        try:
            wait_until(lambda: _has_torch(process), what="its imports", seconds=60)
            assert child.is_alive
            assert process.cwd() == "/"
        finally:
            child.stop(timedelta(seconds=5))

        assert not process.is_running()

    def test_its_job_trains(self, service: Service, tiny_model: Path) -> None:
        held = service.resources(spare_trainer=True, base_models={"tiny": f"path:{tiny_model}"})
        jobs = [service.add_job(), service.add_job()]
        for job_id in jobs:
            train(held, job_id)
        held.stopping.set()
        held.spare.close()

        assert_succeeded(service, *jobs)
        first, second = (service.adapters()[-1].digest for job_id in jobs)
        assert first == second

    @pytest.mark.parametrize("imported", [False, True])
    def test_it_ends_when_its_parent_is_killed(self, tmp_path: Path, imported: bool) -> None:
        pid_file = tmp_path / "pid"
        script = (
            "import threading, time\n"
            "from pathlib import Path\n"
            "from worker.spare import SpareChild\n"
            "spare = SpareChild(threading.Event()); spare.refill()\n"
            f"Path({str(pid_file)!r}).write_text(str(spare.take().pid)); time.sleep(60)"
        )
        parent = psutil.Popen([sys.executable, "-c", script])
        try:
            wait_until(lambda: pid_file.exists() and pid_file.read_text(), what="the spare")
            child = psutil.Process(int(pid_file.read_text()))
            if imported:
                wait_until(lambda: _has_torch(child), what="its imports", seconds=60)
        finally:
            parent.kill()
            parent.wait()

        wait_until(lambda: not child.is_running(), what="its end", seconds=5)


def _has_torch(process: psutil.Process) -> bool:
    return any("libtorch_python" in region.path for region in process.memory_maps())
