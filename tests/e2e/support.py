"""The whole service as its users run it: ``python -m worker.up`` in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy.orm import Session

from api.database import make_engine
from api.projects.service import create_api_key, create_project
from scripts.demo import free_port
from worker.up import ROOT, wait_ready

ENDED = ("succeeded", "failed", "cancelled")
SYSTEM = "Answer with one word."
#: A test runs on one of both services, and the main one on both: what depends on the database or the broker alone is
#: tested on both in tests/api and tests/worker.
EMBEDDED = pytest.mark.parametrize("running", ["embedded"], indirect=True)
ON_SERVERS = pytest.mark.parametrize("running", [pytest.param("servers", marks=pytest.mark.postgres)], indirect=True)


@dataclass
class Running:
    """A running service."""

    url: str
    database_url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, project: str) -> openai.OpenAI:
        """The official client with a key of a new project."""
        with Session(make_engine(self.database_url)) as session, session.begin():
            key = create_api_key(session, create_project(session, project, slug=project), name="test")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def processes(self) -> dict[str, psutil.Process]:
        """api, engine, trainer, sweeper: the outermost process of each."""
        marks = {"api": "api.main", "engine": "worker.engine.app", "trainer": "trainer@", "sweeper": "sweeper@"}
        found: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            line = " ".join(process.cmdline())
            for name, mark in marks.items():
                if mark in line:
                    found.setdefault(name, process)
        return found


@contextmanager
def service(home: Path, base_models: dict[str, str], **environment: str) -> Iterator[Running]:
    """Run the service until the context ends; Ctrl-C must end it with status 0 and leave no process."""
    home.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), home / "service.log"
    database_url = environment.get("UORA_DATABASE_URL", f"sqlite:///{home / 'uora.db'}")
    env = {name: value for name, value in os.environ.items() if not name.startswith("UORA_")} | {
        "UORA_HOME": str(home),
        "UORA_CACHE_DIR": os.environ.get("UORA_CACHE_DIR", str(Path.home() / ".cache" / "uora")),
        "UORA_BASE_MODELS": json.dumps(base_models),
        "UORA_ENGINE_ADVERTISE_URL": f"http://127.0.0.1:{free_port()}",
        **environment,
    }
    with log.open("ab") as output:
        command = [sys.executable, "-m", "worker.up", "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        running = Running(f"http://127.0.0.1:{port}", database_url, process, log)
        try:
            wait_for(lambda: wait_ready(running.url, seconds=1) or process.poll() is not None, seconds=180)
            assert process.poll() is None, log.read_text()[-5000:]
            yield running
        finally:
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGINT)
            status = process.wait(30)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert status == 0, log.read_text()[-5000:]
        assert not alive, f"still running after Ctrl-C: {[p.cmdline() for p in alive]}"


def wait_for(condition: Callable[[], object], *, seconds: float = 120) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.2)


def wait_job(
    client: openai.OpenAI, job_id: str, *, until: tuple[str, ...] = ENDED, seconds: float = 180
) -> FineTuningJob:
    """The job once its status is one of ``until``."""
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status in until, seconds=seconds)
    return client.fine_tuning.jobs.retrieve(job_id)


def chat_rows(pairs: list[tuple[str, str]]) -> bytes:
    """A training file that maps questions to answers."""
    rows = (
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(client: openai.OpenAI, content: bytes, name: str = "rows.jsonl") -> str:
    """Upload a file for tuning; its id."""
    return client.files.create(file=(name, content), purpose="fine-tune").id


def ask(client: openai.OpenAI, model: str, question: str, **options: object) -> str:
    """The greedy answer to one question."""
    fields = {"temperature": 0, "max_tokens": 8} | options
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        **fields,  # type: ignore[call-overload]
    )
    return answer.choices[0].message.content or ""
