"""A server that is told to stop lets nobody wait for a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy.orm import Session

from api.database import make_engine
from api.jobs.models import JobStatus
from api.jobs.repository import add_event
from scripts.demo import free_port
from tests.api.rows import add_job
from tests.api.support import make_tenant, migrate, wait_until
from worker.up import ROOT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_those_who_wait_are_answered_at_once(tmp_path: Path, number: signal.Signals) -> None:
    url = f"sqlite:///{tmp_path / 'uora.db'}"
    migrate(url)
    database = make_engine(url)
    with Session(database) as session, session.begin():
        tenant = make_tenant(session, "Acme")
        job_id = add_job(session, tenant, status=JobStatus.RUNNING).id
        add_event(session, job_id, message="first")
    database.dispose()
    port, log = free_port(), tmp_path / "log"
    environment = os.environ | {"UORA_HOME": str(tmp_path), "UORA_DATABASE_URL": url, "UORA_ENGINE_TOKEN": "x"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    with (
        process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=50) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        try:
            wait_until(lambda: b"startup complete" in log.read_bytes())
            http.headers["Authorization"] = f"Bearer {tenant.key}"
            path = f"/v1/fine_tuning/jobs/{job_id}"
            poll = pool.submit(http.get, f"{path}?wait=60")
            with http.stream("GET", f"{path}/events", headers={"Accept": "text/event-stream"}) as stream:
                lines = stream.iter_lines()
                assert "first" in next(lines)
                # Both requests have arrived: one has begun its answer, and the other one's key was looked for.
                http.get(path)
                told = time.monotonic()
                process.send_signal(number)
                assert poll.result(timeout=20).json()["status"] == "running"
                assert not any("event: end" in line for line in lines)
            process.wait(20)
            assert time.monotonic() - told < 15
        finally:
            process.kill()
