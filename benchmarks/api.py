"""Job polling, event listing and job creation through a real uvicorn on PostgreSQL, beside a constant answer.

Requests per second depend on the machine; what counts is the ratio to a FastAPI route of the same process that returns
a constant JSON of the same size, and that 10,000 jobs with 1,000,000 events answer as 100 jobs do. Contestants take
turns; the client is a process of its own that writes the same bytes again on open connections.

    python -m benchmarks.api            about 8 minutes
    python -m benchmarks.api --smoke    in its short form
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
from fastapi import FastAPI
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session
from starlette.responses import Response

from api.database import make_engine, new_id
from api.files.models import File
from api.jobs.models import Job, JobStatus
from api.main import create_app
from api.projects.service import create_api_key, create_project
from api.settings import SMOLLM2, Settings
from scripts.demo import free_port
from uora.spec import HyperparameterRequest, TrainingOptions, UoraSpec
from worker.up import ROOT, migrate

POSTGRES = os.environ.get("BENCH_POSTGRES", "postgres@127.0.0.1:5432")
CONNECTIONS = 32
#: Jobs that dashboards look at, in turn.
POLLED_JOBS = 50
#: Under load: dashboards, from one look of each to its next, and answers that the engine makes at once.
DASHBOARDS = 16
POLL_SECONDS = 0.2
STREAMS = 32
JOBS = "/v1/fine_tuning/jobs"
#: Of a hundred jobs, two run, three wait, and the others have ended.
STATUSES = dict(enumerate([JobStatus.RUNNING] * 2 + [JobStatus.QUEUED] * 3))
EVENTS = """
INSERT INTO job_events (id, created_at, job_id, level, type, message, data)
SELECT 'ft-event-' || jobs.seq || '-' || step, now(), jobs.id, 'info', 'metrics',
       'Step ' || step || '/1000: training loss=1.23',
       jsonb_build_object('step', step, 'total_steps', 1000, 'train_loss', 1.23, 'learning_rate', 0.001)
FROM generate_series(1, %s) AS step, jobs ORDER BY step, jobs.seq
"""
console = Console(stderr=True, width=120)


def make_app() -> FastAPI:
    """The api, with the constant routes beside its own: the same server, settings and middleware."""
    app = create_app()

    @cache
    def constant() -> tuple[bytes, Any]:
        body = Path(os.environ["BENCH_CONSTANT"]).read_bytes()
        return body, json.loads(body)

    @app.get("/constant/bytes")
    async def constant_bytes() -> Response:
        return Response(constant()[0], media_type="application/json")

    @app.get("/constant/value")
    async def constant_value() -> Any:
        return constant()[1]

    # As if it were the only route: those of the api are looked through in their order.
    app.router.routes.sort(key=lambda route: not getattr(route, "path", "").startswith("/constant"))
    return app


# The client


@dataclass(frozen=True)
class Load:
    """What every connection sends, again and again."""

    port: int
    #: Whole requests; connections begin at different ones.
    requests: tuple[bytes, ...]
    seconds: float
    connections: int = CONNECTIONS
    status: int = 200
    #: Seconds from one request of a connection to its next one; 0 sends it as soon as the answer is there.
    pace: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What came of it."""

    per_second: float
    p50_ms: float
    p99_ms: float


def drive(load: Load) -> Measured:
    """Send the load from this process."""
    return asyncio.run(_drive(load))


async def _drive(load: Load) -> Measured:
    began = time.perf_counter()
    until = began + load.seconds
    latencies = await asyncio.gather(*(_connection(load, number, until) for number in range(load.connections)))
    seconds = time.perf_counter() - began
    every = sorted(latency for of_one in latencies for latency in of_one)
    return Measured(len(every) / seconds, *(1000 * every[int(share * (len(every) - 1))] for share in (0.5, 0.99)))


async def _connection(load: Load, number: int, until: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    latencies: list[float] = []
    turn = number * len(load.requests) // load.connections
    while (sent := time.perf_counter()) < until or not latencies:
        writer.write(load.requests[turn % len(load.requests)])
        turn += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
        body = await reader.readexactly(length)
        if int(head[9:12]) != load.status:
            raise RuntimeError(f"expected {load.status}, found {head[:200]!r} {body[:300]!r}")
        latencies.append(time.perf_counter() - sent)
        if load.pace:
            await asyncio.sleep(max(0.0, load.pace - latencies[-1]))
    writer.close()
    return latencies


# What is asked


@dataclass(frozen=True)
class Api:
    """A running api over a database with jobs."""

    port: int
    database: str
    key: str
    file_id: str
    jobs: list[str]

    def change_all(self) -> None:
        """Make each job another than it was, so that no answer about it is kept."""
        with psycopg.connect(self.database.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("UPDATE jobs SET version = version + 1")

    def client(self) -> httpx.Client:
        """A client for single requests."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60)

    def request(self, path: str, *, method: str = "GET", tag: str | None = None, body: bytes = b"") -> bytes:
        """A request as it goes over the wire."""
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {self.key}"]
        lines += [f"If-None-Match: {tag}"] if tag else []
        lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"] if body else []
        return "\r\n".join([*lines, "", ""]).encode() + body

    def repeated(self, paths: list[str]) -> tuple[bytes, ...]:
        """Requests for what the client has already."""
        with self.client() as http:
            tags = [http.get(path).raise_for_status().headers["etag"] for path in paths]
        return tuple(self.request(path, tag=tag) for path, tag in zip(paths, tags, strict=True))


def contestants(api: Api) -> dict[str, tuple[tuple[bytes, ...], int]]:
    """Names with requests and the status that they have."""
    api.change_all()
    jobs = [f"{JOBS}/{job_id}" for job_id in api.jobs[:: max(1, len(api.jobs) // POLLED_JOBS)]]
    events = [f"{path}/events" for path in jobs]
    create = json.dumps({"model": "tiny", "training_file": api.file_id}).encode()
    return {
        "constant bytes": ((api.request("/constant/bytes"),), 200),
        "constant value": ((api.request("/constant/value"),), 200),
        "poll": (tuple(map(api.request, jobs)), 200),
        "poll 304": (api.repeated(jobs), 304),
        # 10,000 jobs are more than there is time for: each is asked for once, and read.
        "poll, all jobs in turn": (tuple(api.request(f"{JOBS}/{job_id}") for job_id in api.jobs), 200),
        "events": (tuple(map(api.request, events)), 200),
        "events 304": (api.repeated(events), 304),
        "list": ((api.request(JOBS),), 200),
        "create": ((api.request(JOBS, method="POST", body=create),), 200),
    }


def measure(api: Api, pool: Pool, *, seconds: float, repetitions: int) -> dict[str, Measured]:
    """Medians; in each repetition all take their turn."""
    found: dict[str, list[Measured]] = {}
    for repetition in range(repetitions):
        for name, (requests, status) in contestants(api).items():
            measured = pool.apply(drive, (Load(api.port, requests, seconds, status=status),))
            found.setdefault(name, []).append(measured)
            console.print(f"repetition {repetition + 1}: {name}: {measured.per_second:.0f}/s", style="dim")
    return {name: _median(values) for name, values in found.items()}


def _median(values: list[Measured]) -> Measured:
    return Measured(*(statistics.median(getattr(one, field) for one in values) for field in Measured.__annotations__))


# The service


@contextmanager
def database(*, jobs: int, events: int, unfinished: bool = True) -> Iterator[tuple[str, str, str, list[str]]]:
    """A database on the PostgreSQL server with one project's jobs and so many events of each: URL, key, file, ids.

    Jobs that are ``unfinished`` are left out where a trainer would take them.
    """
    name = f"uora_bench_{secrets.token_hex(4)}"
    with psycopg.connect(f"postgresql://{POSTGRES}/postgres", autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}"')
        try:
            console.print(f"filling a database: {jobs:,} jobs, {jobs * events:,} events", style="dim")
            url = f"postgresql+psycopg://{POSTGRES}/{name}"
            migrate(Settings(database_url=url, engine_token=SecretStr("none")))
            filled = _add_jobs(url, range(0 if unfinished else len(STATUSES), jobs))
            with psycopg.connect(f"postgresql://{POSTGRES}/{name}", autocommit=True) as connection:
                connection.execute(EVENTS, [events])
                connection.execute("UPDATE jobs SET event_count = %s", [events])
                connection.execute("VACUUM ANALYZE")
            yield (url, *filled)
        finally:
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _add_jobs(url: str, numbers: range) -> tuple[str, str, list[str]]:
    engine = make_engine(url)
    with Session(engine) as session, session.begin():
        project = create_project(session, "bench")
        key = create_api_key(session, project, name="bench")
        file = File(
            id=new_id("file-"),
            project_id=project.id,
            filename="rows.jsonl",
            purpose="fine-tune",
            bytes=10,
            sha256="0" * 64,
            storage_key="none",
        )
        jobs = [_job(project.id, file.id, number) for number in numbers]
        session.add_all([file, *jobs])
        filled = key, file.id, [job.id for job in jobs]
    engine.dispose()
    return filled


def _job(project_id: str, file_id: str, number: int) -> Job:
    return Job(
        id=new_id("ftjob-"),
        project_id=project_id,
        status=STATUSES.get(number % 100, JobStatus.SUCCEEDED),
        model="tiny",
        base_model="tiny",
        training_file=file_id,
        seed=number,
        labels={"number": str(number)},
        hyperparameters=HyperparameterRequest().model_dump(mode="json"),
        adapter=UoraSpec().model_dump(mode="json"),
        options=TrainingOptions().model_dump(mode="json"),
        progress={"step": 999, "total_steps": 1000, "train_loss": 1.23, "tokens_per_second": 321.0, "seconds_left": 1},
    )


@contextmanager
def serving(*, jobs: int, events: int) -> Iterator[Api]:
    """The api in a process of its own."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uora-bench-")))
        url, key, file_id, ids = stack.enter_context(database(jobs=jobs, events=events))
        constant, port = home / "constant.json", free_port()
        environment = {
            "UORA_HOME": str(home),
            "UORA_DATABASE_URL": url,
            "UORA_ENGINE_TOKEN": "benchmark",
            "UORA_BASE_MODELS": json.dumps({"tiny": "path:/nowhere"}),
            "BENCH_CONSTANT": str(constant),
        }
        stack.enter_context(_process(environment, port, home / "api.log"))
        api = Api(port, url, key, file_id, ids)
        with api.client() as http:
            constant.write_bytes(http.get(f"{JOBS}/{ids[0]}").raise_for_status().content)
        yield api


@contextmanager
def _process(environment: dict[str, str], port: int, log: Path) -> Iterator[None]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UORA_")}
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.api:make_app", "--no-access-log"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, env=inherited | environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"http://127.0.0.1:{port}/healthz"):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(log.read_text()[-3000:])
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def _answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=2).is_success
    return False


# While an engine is saturated and a job trains


def under_load(pool: Pool, *, seconds: float, smoke: bool) -> Measured:
    """Polls of the job that trains, paced as many dashboards do it."""
    from tests.e2e.support import chat_rows, service, upload, wait_for

    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uora-bench-")))
        url, *_ = stack.enter_context(database(jobs=100, events=100, unfinished=False))
        model, source = _base_model(home, smoke=smoke)
        # A spare waits for further jobs, which there are not.
        running = stack.enter_context(service(home, {model: source}, UORA_DATABASE_URL=url, UORA_SPARE_TRAINER="false"))
        client = running.client("polled")
        rows = upload(client, chat_rows([(f"question {number}", f"answer {number}") for number in range(256)]))
        job = client.fine_tuning.jobs.create(
            model=model,
            training_file=rows,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}},
        )
        # Only then is the engine saturated, for the job would wait minutes for the cores to begin with.
        wait_for(lambda: (getattr(client.fine_tuning.jobs.retrieve(job.id), "progress", None) or {}).get("step"))
        stop = threading.Event()
        streams = stack.enter_context(ThreadPoolExecutor(STREAMS))
        stack.callback(stop.set)
        answered = threading.Event()
        asked = [streams.submit(_keep_asking, client, model, stop, answered) for _ in range(STREAMS)]
        answered.wait(120)
        api = Api(int(running.url.rsplit(":", 1)[1]), url, client.api_key, rows, [job.id])
        request = api.request(f"{JOBS}/{job.id}")
        load = Load(api.port, (request,), seconds, connections=DASHBOARDS, pace=POLL_SECONDS)
        found: Measured = pool.apply(drive, (load,))
        status = client.fine_tuning.jobs.cancel(job.id).status  # refused if it has ended
        stop.set()
        if status != "running" or not sum(each.result() for each in asked):
            sys.exit(f"There was no load: the job is {status}, or the engine answered nobody.")
        return found


def _base_model(home: Path, *, smoke: bool) -> tuple[str, str]:
    if not smoke:
        return SMOLLM2, f"known:{SMOLLM2}"
    from tests.tiny import make_tiny_llama

    return "tiny", f"path:{make_tiny_llama(home / 'base')}"


def _keep_asking(client: openai.OpenAI, model: str, stop: threading.Event, answered: threading.Event) -> int:
    answers = 0
    while not stop.is_set():
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Go on."}], max_tokens=64)
        answers += 1
        answered.set()
    return answers


# All of it


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    rates: dict[int, dict[str, Measured]] = {}
    with get_context("spawn").Pool(1) as pool:
        for jobs in arguments.sizes:
            with serving(jobs=jobs, events=arguments.events) as api:
                rates[jobs] = measure(api, pool, seconds=arguments.seconds, repetitions=arguments.repetitions)
        loaded = under_load(pool, seconds=4 * arguments.seconds, smoke=arguments.smoke)
    show(rates, loaded)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few jobs, a tiny model, fractions of a second")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each contestant and repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    arguments.sizes, arguments.events = (100, 10_000), 100
    if arguments.smoke:
        arguments.sizes, arguments.events, arguments.seconds, arguments.repetitions = (10, 100), 10, 0.3, 1
    return arguments


def show(rates: dict[int, dict[str, Measured]], loaded: Measured) -> None:
    """The table, and the line."""
    few, many = (rates[size] for size in sorted(rates))
    constant = many["constant bytes"].per_second
    growth = {name: many[name].per_second / few[name].per_second for name in many}
    table = Table(title=f"one uvicorn process, {CONNECTIONS} connections, {max(rates):,} jobs")
    for column in ("", "requests/s", "of constant bytes", "p50 ms", "p99 ms", f"of the rate at {min(rates):,} jobs"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in many.items():
        numbers = (found.per_second / constant, found.p50_ms, found.p99_ms, growth[name])
        table.add_row(name, f"{found.per_second:.0f}", *(f"{number:.2f}" for number in numbers))
    console.print(table)
    line = {
        "poll_vs_constant": many["poll"].per_second / constant,
        "poll304_vs_constant": many["poll 304"].per_second / constant,
        "poll_vs_constant_value": many["poll"].per_second / many["constant value"].per_second,
        "poll_read_vs_constant": many["poll, all jobs in turn"].per_second / constant,
        "poll_p99_ms_under_load": loaded.p99_ms,
        "growth_100_to_10000": min(growth[name] for name in ("poll", "poll 304", "events", "events 304", "create")),
        "growth": {name: round(value, 3) for name, value in growth.items()},
        "per_second": {name: round(found.per_second) for name, found in many.items()},
        "cores": os.cpu_count(),
    }
    print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in line.items()}))


if __name__ == "__main__":
    main()
