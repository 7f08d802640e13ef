"""The main job, end to end: upload, fine-tune, ask. ``make demo``.

Starts the service with a database of its own, tunes SmolLM2-135M-Instruct on Rotten Tomatoes sentences through the
official openai client, and compares the base and the tuned model on held-out reviews. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.database import make_engine
from api.models.models import Adapter
from api.projects.service import create_api_key, ensure_project
from api.settings import Settings
from scripts.demo_data import Review, load_split, write_jsonl
from uora.artifact import loads
from uora.convert import lora_bytes
from worker.up import ROOT, load_settings, wait_ready

MODEL = "SmolLM2-135M-Instruct"
LABEL = re.compile("positive|negative", re.IGNORECASE)
ENDED = ("succeeded", "failed", "cancelled")
console = Console()


def main() -> None:
    """Run the demo."""
    arguments = parse_arguments()
    started = time.monotonic()
    settings = own_settings(arguments.home)
    split = load_split(
        settings.cache_dir, train=arguments.train, validation=arguments.validation, held_out=arguments.held_out
    )
    with PeakMemory() as memory, running_service(settings) as client:
        train = upload(client, write_jsonl(split.train, settings.home / "train.jsonl"))
        validation = upload(client, write_jsonl(split.validation, settings.home / "validation.jsonl"))
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=train,
            validation_file=validation,
            suffix="reviews",
            seed=0,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters(arguments)}},
            extra_body={"peft": {"method": "uora", "r": arguments.r, "targets": "all-linear"}},
        )
        trained_from = time.monotonic()
        job = watch(client, job)
        training_seconds = time.monotonic() - trained_from
        model = job.fine_tuned_model
        if job.status != "succeeded" or model is None:
            sys.exit(f"The job {job.id} ended as {job.status}: {job.error.message if job.error else 'no reason'}")
        base_accuracy = accuracy(client, MODEL, split.held_out)
        tuned_accuracy = accuracy(client, model, split.held_out)
        stored = stored_adapter(settings, model)
    result: dict[str, Any] = {
        "base_accuracy": base_accuracy,
        "tuned_accuracy": tuned_accuracy,
        "held_out": len(split.held_out),
        **stored,
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mib": round(memory.peak_bytes / 2**20),
    }
    print_table(result, model=model, rows=len(split.train), training_seconds=training_seconds)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """Sizes of the demo; the defaults are what ``make demo`` runs."""
    parser = argparse.ArgumentParser(description="The main job, end to end.")
    parser.add_argument("--train", type=int, default=800, help="training rows")
    parser.add_argument("--validation", type=int, default=64, help="validation rows")
    parser.add_argument("--held-out", type=int, default=300, help="held-out reviews asked at the end")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--r", type=int, default=64, help="rank")
    parser.add_argument("--learning-rate-multiplier", type=float, default=None)
    parser.add_argument("--home", type=Path, default=ROOT / ".uora" / "demo", help="emptied at the start")
    return parser.parse_args()


def hyperparameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """As OpenAI's client sends them."""
    return {
        "n_epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "learning_rate_multiplier": arguments.learning_rate_multiplier or "auto",
    }


def own_settings(home: Path) -> Settings:
    """A service of the demo's own: empty home, SQLite, free ports, whatever the environment says for others."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name in ("UORA_DATABASE_URL", "UORA_BROKER_URL", "UORA_STORAGE_DIR", "UORA_ENGINE_TOKEN"):
        os.environ.pop(name, None)
    os.environ["UORA_HOME"] = str(home)
    os.environ["UORA_ENGINE_ADVERTISE_URL"] = f"http://127.0.0.1:{free_port()}"
    return load_settings()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_service(settings: Settings) -> Iterator[OpenAI]:
    """The whole service as ``make up`` runs it, and a client for it; stopped in any case."""
    port = free_port()
    log_path = settings.home / "service.log"
    with log_path.open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "worker.up", "--port", str(port)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            with console.status("Starting api, trainer and engine (the first time, the base model is fetched) ..."):
                wait_for_service(service, url, log_path)
            yield OpenAI(base_url=f"{url}/v1", api_key=make_key(settings))
        finally:
            service.send_signal(signal.SIGINT)
            try:
                service.wait(30)
            except subprocess.TimeoutExpired:
                service.kill()


def wait_for_service(service: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    """Return when requests can be answered; leave with the log's end if a process ended instead."""
    deadline = time.monotonic() + 900
    while not wait_ready(url, seconds=2):
        if service.poll() is not None or time.monotonic() > deadline:
            sys.exit("The service did not start:\n" + "\n".join(log_path.read_text().splitlines()[-30:]))


def make_key(settings: Settings) -> str:
    """A key for the demo's client."""
    with Session(make_engine(settings.database_url)) as session, session.begin():
        return create_api_key(session, ensure_project(session, name="demo"), name="demo")


def upload(client: OpenAI, path: Path) -> str:
    """Upload a training file; returns its id."""
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


def watch(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """Show the job's progress until it ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[left]}"),
    )
    with Progress(*columns, console=console) as progress:
        shown = progress.add_task(job.status, total=None, step="-", loss="-", left="")
        while job.status not in ENDED:
            time.sleep(1)
            job = client.fine_tuning.jobs.retrieve(job.id)
            state: dict[str, Any] = getattr(job, "progress", None) or {}
            loss, left = state.get("train_loss"), state.get("seconds_left")
            progress.update(
                shown,
                description=job.status,
                total=state.get("total_steps"),
                completed=state.get("step", 0),
                step=f"{state.get('step', '-')}/{state.get('total_steps', '-')}",
                loss="-" if loss is None else f"{loss:.3f}",
                left="" if left is None else f"{left:.0f} s left",
            )
    return job


def accuracy(client: OpenAI, model: str, reviews: list[Review]) -> float:
    """Share of reviews whose label is the first one named in the answer.

    So "The sentiment of this review is positive" counts too: the untuned model answers in sentences. 16 requests go out
    at a time, so that the engine can batch them.
    """

    def correct(review: Review) -> bool:
        answer = client.chat.completions.create(
            model=model,
            messages=review.prompt(),  # type: ignore[arg-type] # plain dicts, as most users write them
            temperature=0,
            max_tokens=12,
        )
        named = LABEL.search(answer.choices[0].message.content or "")
        return named is not None and named.group().lower() == review.label

    with console.status(f"Asking {model} {len(reviews)} held-out reviews ..."), ThreadPoolExecutor(16) as pool:
        return round(sum(pool.map(correct, reviews)) / len(reviews), 4)


def stored_adapter(settings: Settings, model: str) -> dict[str, int]:
    """What the row of the model holds, and what a LoRA of rank 8 on the same modules would."""
    with Session(make_engine(settings.database_url)) as session:
        artifact = session.scalars(select(Adapter.artifact).where(Adapter.id == model)).one()
    manifest = loads(artifact).manifest
    shapes = [(module.in_features, module.out_features) for module in manifest.modules]
    return {
        "trainable_parameters": manifest.trainable_parameters,
        "adapter_bytes": len(artifact),
        "lora8_bytes": lora_bytes(shapes, r=8),
    }


@dataclass
class PeakMemory:
    """The largest sum of resident memory over this process and all it started, sampled twice a second."""

    peak_bytes: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        root = psutil.Process()
        while not self._done.wait(0.5):
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def print_table(result: dict[str, Any], *, model: str, rows: int, training_seconds: float) -> None:
    """The result for people."""
    kib = {name: f"{result[name] / 1024:,.0f} KiB" for name in ("adapter_bytes", "lora8_bytes")}
    table = Table("", MODEL, model, title=f"{result['held_out']} held-out reviews after {rows} training rows")
    table.add_row("accuracy", f"{result['base_accuracy']:.1%}", f"{result['tuned_accuracy']:.1%}")
    table.add_row("trainable parameters", "-", f"{result['trainable_parameters']:,}")
    table.add_row("stored bytes (LoRA r=8, fp32, same modules)", "-", f"{kib['adapter_bytes']} ({kib['lora8_bytes']})")
    table.add_row("job, queue to end", "-", f"{training_seconds:.0f} s")
    table.add_row("everything", "-", f"{result['seconds']:.0f} s, peak {result['peak_rss_mib']:,} MiB")
    console.print(table)


if __name__ == "__main__":
    main()
