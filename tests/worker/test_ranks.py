"""A job in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from sqlalchemy import select

from api.jobs.models import Job
from api.models.models import Adapter
from tests.worker.support import BASE_MODEL, Service, chat_rows, wait_until
from uora.artifact import loads
from uora.data import read_file
from uora.spec import HyperparameterRequest, TrainingOptions, TrainingSpec, UoraSpec, resolve
from worker.child_process import child_environment
from worker.context import Resources
from worker.messages import ChildRequest, Failed, Run, parse_report
from worker.tasks.training import train

KEY = "goes together"
OPTIONS = TrainingOptions(save_steps=5)


@pytest.fixture
def held(service: Service, tiny_model: Path) -> Resources:
    """A trainer with two processes a job."""
    return service.resources(training_processes=2, torch_threads=0, base_models={BASE_MODEL: f"path:{tiny_model}"})


@contextmanager
def training(held: Resources, job_id: str) -> Iterator[list[psutil.Process]]:
    """The trainer works on a job; its processes, the first one first, when there is a state to go on from.

    At the end of the block the trainer is done, and they are gone.
    """
    thread = threading.Thread(target=train, args=(held, job_id))
    thread.start()
    processes: list[psutil.Process] = []
    try:
        wait_until(lambda: progress_step(held, job_id) > OPTIONS.save_steps, what="steps", seconds=60)
        (child,) = [process for process in psutil.Process().children() if "worker.child" in process.cmdline()]
        processes += [child, *child.children()]
        yield processes
    finally:
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(processes) == 2
    wait_until(lambda: not any(map(is_running, processes)), what="the end of the processes", seconds=5)


def progress_step(held: Resources, job_id: str) -> int:
    with held.sessions() as session:
        progress = session.execute(select(Job.progress).where(Job.id == job_id)).scalar_one()
    return progress["step"] if progress else 0


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_paused_and_resumed_job_comes_to_the_adapter_of_one_process(
    service: Service, held: Resources, tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    from tests.uora.task_cases import Recorder
    from uora.models import fetch
    from uora.training import train as train_alone

    more = {"rows": 7, "n_epochs": 10, "training_options": OPTIONS, "cotraining_key": KEY}
    job_id, other = service.add_job(**more), service.add_job(**more)
    with training(held, job_id) as processes:
        addresses = {each.laddr.ip for process in processes for each in process.net_connections("inet")}
        service.update(job_id, pause_requested=True)
    assert addresses == {"127.0.0.1"}  # none is open to the network
    assert service.job(job_id).status == "paused"
    service.update(job_id, status="queued", pause_requested=False)
    train(held, job_id)

    job = service.job(job_id)
    assert (job.status, job.error, job.attempt) == ("succeeded", None, 2)
    assert service.job(other).status == "queued"  # jobs that share their passes have one process
    with service.storage.local_path(job.training_file) as rows:
        expected = train_alone(
            TrainingSpec.model_validate(job.training_spec),
            base=fetch(BASE_MODEL, f"path:{tiny_model}", cache_dir=tmp_path),
            training=read_file(rows, "chat"),
            validation=None,
            observer=Recorder(),
            cache_dir=None,
            dtype=torch.float32,
        )
    with service.sessions() as session:
        found = session.execute(select(Adapter.artifact).where(Adapter.id == job.fine_tuned_model)).scalar_one()
    for name, tensor in loads(expected.artifact).tensors.items():
        np.testing.assert_allclose(loads(found).tensors[name], tensor, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_takes_the_others_along(service: Service, held: Resources, victim: int) -> None:
    job_id = service.add_job(rows=40, n_epochs=50, training_options=OPTIONS)
    with training(held, job_id) as processes:
        processes[1].terminate()  # as by a service manager, to all at once: the first one is to say what happens
        step = progress_step(held, job_id)
        wait_until(lambda: progress_step(held, job_id) > step + OPTIONS.save_steps, what="more steps")
        killed = time.monotonic()
        processes[victim].send_signal(signal.SIGKILL)
    took = time.monotonic() - killed

    job = service.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "out_of_memory_or_killed")
    assert job.progress is not None
    assert 0 < job.progress["step"] < 1000
    assert took < 5


def test_a_bad_row_is_told_as_it_is(service: Service, held: Resources) -> None:
    job_id = service.add_job(training=chat_rows(2) + b"{}\n")
    train(held, job_id)

    error = service.job(job_id).error
    assert error is not None
    assert (error["code"], error["param"]) == ("missing_messages", "training_file")
    assert "Line 3" in error["message"]


@pytest.mark.parametrize(
    ("other", "status", "reported"),
    [
        ("print(FAILED, flush=True); sys.stdin.read()", 0, True),
        ("sys.exit(3)", 3, False),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, False),
        ("os.kill(os.getpid(), 15)", 128 + signal.SIGTERM, False),
    ],
)
def test_what_ends_one_ends_the_first(tmp_path: Path, other: str, status: int, reported: bool) -> None:
    """While the first waits for what never comes."""
    failed = Failed.model_validate({"failure": {"kind": "user", "code": "out_of_memory", "message": "m"}})
    script = f"import os, sys; FAILED = {failed.model_dump_json()!r}; sys.stdin.readline(); {other}"
    first = f"import sys; from worker import child, ranks; ranks.COMMAND = (sys.executable, '-c', {script!r}); "
    process = subprocess.Popen(
        [sys.executable, "-c", first + "child.run_and_exit()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,
    )
    with process:
        request = request_of(tmp_path).model_dump_json().encode()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request + b"\n")
        process.stdin.flush()
        assert process.wait(timeout=20) == status
        said = [parse_report(line.decode()) for line in process.stdout]
    assert said == ([failed] if reported else [])


def request_of(folder: Path) -> ChildRequest:
    """For two processes, with a file that never says anything."""
    os.mkfifo(folder / "fifo")
    spec = resolve(HyperparameterRequest(n_epochs=1), adapter=UoraSpec(r=4), learning_rate=0.01, seed=1, n_examples=8)
    run = Run(
        spec=spec,
        training_file=folder / "fifo",
        validation_file=None,
        resume=None,
        warm_start=None,
        work_dir=folder,
    )
    return ChildRequest(
        runs=(run,),
        base_model=BASE_MODEL,
        base_source="path:/nowhere",
        work_dir=folder,
        cache_dir=folder,
        dtype="float32",
        torch_threads=1,
        processes=2,
    )
