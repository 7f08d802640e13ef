"""From the claim of a job to its first step: ``python -m benchmarks.starting [--smoke]``.

One trainer on SQLite, without broker or HTTP, and the real SmolLM2-135M-Instruct. For its first job it starts a process
that imports torch and transformers; each of the others takes the process that was started when the job before it had
ended, and that has imported them meanwhile. Seconds are those between two rows of the database: the claim, and the
event that the first step begins. That step's own work is not among them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from sqlalchemy import select

from api.database import make_engine, make_sessions, new_id
from api.files.models import File
from api.jobs.models import Job, JobEvent, JobStatus
from api.projects.service import ensure_project
from api.queue import CeleryQueue
from api.settings import SMOLLM2, Settings
from api.storage import LocalStore
from scripts.demo_data import load_split, write_jsonl
from uora.spec import HyperparameterRequest, UoraSpec, resolve
from worker.context import Resources
from worker.spare import SpareChild
from worker.tasks.training import train
from worker.up import migrate

BATCH = 8
console = Console()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="uora-starting-") as folder:
        settings = Settings(
            home=Path(folder),
            database_url=f"sqlite:///{folder}/rows.db",
            base_models={SMOLLM2: f"known:{SMOLLM2}"},
            engine_token=secrets.token_urlsafe(),
        )
        migrate(settings)
        cold, *warm = _measure(_resources(settings), arguments)
    console.print(f"Warm, one by one: {', '.join(f'{seconds:.2f}' for seconds in warm)} s. Below is their median.")
    result = {"cold_seconds": cold, "warm_seconds": statistics.median(warm), "cores": os.cpu_count()}
    console.print_json(json.dumps(result), indent=None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one warm job, of few rows")
    parser.add_argument("--jobs", type=int, default=3, help="warm ones")
    parser.add_argument("--rows", type=int, default=64, help="of each job's training file")
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between two jobs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.jobs, arguments.rows = 1, BATCH
    return arguments


def _resources(settings: Settings) -> Resources:
    stopping = threading.Event()
    return Resources(
        settings=settings,
        sessions=make_sessions(make_engine(settings.database_url)),
        queue=CeleryQueue(settings),
        storage=LocalStore(settings.storage_dir),
        owner="benchmark",
        stopping=stopping,
        spare=SpareChild(stopping),
    )


def _measure(held: Resources, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each job, the cold one first."""
    reviews = load_split(held.settings.cache_dir, train=arguments.rows, validation=0, held_out=0).train
    rows = write_jsonl(reviews, held.settings.home / "train.jsonl").read_bytes()
    jobs = [_add_job(held, rows, count=arguments.rows) for _ in range(1 + arguments.jobs)]
    try:
        train(held, jobs[0])
        for job_id in jobs[1:]:
            time.sleep(arguments.pause)
            train(held, job_id)
    finally:
        held.stopping.set()
        held.spare.close()
    return [_seconds_to_first_step(held, job_id) for job_id in jobs]


def _add_job(held: Resources, rows: bytes, *, count: int) -> str:
    """A job as the sweeper leaves it when it has validated the file."""
    request, adapter = HyperparameterRequest(n_epochs=1, batch_size=BATCH), UoraSpec()
    spec = resolve(request, adapter=adapter, learning_rate=None, seed=0, n_examples=count)
    key = new_id("file-")
    stored = held.storage.write(key, io.BytesIO(rows), max_bytes=held.settings.max_upload_bytes)
    with held.sessions.begin() as session:
        project = ensure_project(session, name="benchmark")
        file = File(
            id=key,
            project_id=project.id,
            filename="train.jsonl",
            purpose="fine-tune",
            bytes=stored.bytes,
            sha256=stored.sha256,
            storage_key=key,
        )
        job = Job(
            id=new_id("ftjob-"),
            project_id=project.id,
            status=JobStatus.QUEUED,
            model=SMOLLM2,
            base_model=SMOLLM2,
            training_file=key,
            seed=0,
            hyperparameters=request.model_dump(mode="json"),
            adapter=adapter.model_dump(mode="json"),
            training_spec=spec.model_dump(mode="json"),
        )
        session.add_all([file, job])
        return job.id


def _seconds_to_first_step(held: Resources, job_id: str) -> float:
    with held.sessions() as session:
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        if job.status != JobStatus.SUCCEEDED or job.started_at is None:
            sys.exit(f"{job_id} is {job.status}: {job.error}")
        started = JobEvent.message == "Fine-tuning job started"
        event = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, started)).one()
        return round((event.created_at - job.started_at).total_seconds(), 2)


if __name__ == "__main__":
    main()
