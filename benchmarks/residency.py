"""An engine that follows thousands of rows: ``python -m benchmarks.residency [--smoke]``.

PostgreSQL, SmolLM2-135M-Instruct and adapters of ``benchmarks.serving`` (UORA on q and v, r = 64), whose rows are in
the database before the engine's parts start. Measured are the time until all are resident, then with all of them
resident the times from a commit until the engine has a new adapter, and until it has let a deleted one go, at random
moments between two looks of the engine; and what one look costs while nothing changes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import psutil
import torch
from rich.console import Console
from sqlalchemy import create_engine, delete, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api.database import make_engine, make_sessions, new_id
from api.models.models import Adapter
from api.projects.service import ensure_project
from api.settings import SMOLLM2, Settings
from benchmarks.serving import artifacts, row_of
from benchmarks.training import CACHE
from uora.artifact import Artifact
from worker.engine.runner import Runner, build_runner
from worker.up import migrate

#: Of an adapter in memory where the processor has no bfloat16.
FLOAT32_BYTES = 122_880
#: Rows of one transaction while the database is filled.
BATCH = 200
#: Seconds between two questions whether the engine has followed.
TICK = 0.001
console = Console()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    with _database(arguments.server) as url:
        result = Bench(url, arguments).run()
    console.print_json(json.dumps(result), indent=None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few hundred rows and few changes")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--changes", type=int, default=100, help="new adapters, and deletions")
    parser.add_argument("--server", default="postgresql+psycopg://postgres@127.0.0.1:5432", help="PostgreSQL's URL")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rows, arguments.changes = 300, 5
    return arguments


@contextmanager
def _database(server: str) -> Iterator[str]:
    """A database of the benchmark's own."""
    admin = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    name = f"uora_benchmark_{secrets.token_hex(4)}"
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        sys.exit(f"No PostgreSQL answers at {server} ({error.orig}); name one with --server.")
    try:
        yield f"{server}/{name}"
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


class Bench:
    """A database full of adapters, and an engine's parts that have not started."""

    def __init__(self, url: str, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        settings = Settings(
            database_url=url,
            cache_dir=CACHE,
            base_models={SMOLLM2: f"known:{SMOLLM2}"},
            engine_adapter_memory=2 * FLOAT32_BYTES * (arguments.rows + arguments.changes),
            engine_token=secrets.token_urlsafe(),
        )
        migrate(settings)
        self.database = make_engine(url)
        self.sessions: sessionmaker[Session] = make_sessions(self.database)
        with self.sessions.begin() as session:
            self.project = ensure_project(session, name="benchmark").id
        runner = build_runner(settings)
        if not isinstance(runner, Runner):
            raise TypeError(f"{SMOLLM2} writes no text")
        self.runner = runner

    def run(self) -> dict[str, object]:
        """Fill the database, start the engine's parts, and measure."""
        made = self._artifacts(self.arguments.rows + self.arguments.changes)
        stored = islice(made, self.arguments.rows)
        while some := list(islice(stored, BATCH)):
            self._add(some)
        with self.database.begin() as connection:
            connection.execute(text("ANALYZE adapters"))
        before = psutil.Process().memory_info().rss
        seconds = self._load()
        grown = psutil.Process().memory_info().rss - before
        arrivals, departures = self._changes(list(made))
        polls = [_milliseconds(lambda: self.runner.store.version(SMOLLM2)) for _ in range(100)]
        self.runner.stop()
        self.database.dispose()
        return {
            "rows": self.arguments.rows,
            "load_seconds": round(seconds, 2),
            "rows_per_second": round(self.arguments.rows / seconds),
            "commit_to_resident_p50_ms": round(statistics.median(arrivals)),
            "commit_to_resident_p95_ms": round(float(np.percentile(arrivals, 95))),
            "deletion_p95_ms": round(float(np.percentile(departures, 95))),
            "poll_ms": round(statistics.median(polls), 2),
            "resident_bytes": self.runner.bank.bytes,
            "process_bytes": grown,
            "dtype": str(self.runner.bank.dtype).removeprefix("torch."),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }

    def _artifacts(self, count: int) -> Iterator[Artifact]:
        modules = tuple(
            module for name, module in self.runner.bank.linears.items() if name.endswith(("q_proj", "v_proj"))
        )
        return artifacts(self.runner.base, modules, count, hits=True)

    def _add(self, some: Sequence[Artifact]) -> None:
        with self.sessions.begin() as session:
            session.add_all([row_of(new_id("ft:"), artifact, project=self.project) for artifact in some])

    def _load(self) -> float:
        """Seconds until all rows are resident."""
        begun = time.perf_counter()
        self.runner.start()
        _wait(lambda: len(self.runner.bank) == self.arguments.rows, seconds=3600)
        return time.perf_counter() - begun

    def _changes(self, new: Sequence[Artifact]) -> tuple[list[float], list[float]]:
        """Milliseconds from each commit until the engine has a new adapter; and until it has not a deleted one."""
        draw = random.Random(0)  # noqa: S311 # moments
        arrivals, departures = [], []
        for artifact in new:
            digest = artifact.manifest.digest
            time.sleep(draw.uniform(0, 1))
            self._add([artifact])
            arrivals.append(self._until(digest, resident=True))
            time.sleep(draw.uniform(0, 1))
            with self.sessions.begin() as session:
                session.execute(delete(Adapter).where(Adapter.digest == digest))
            departures.append(self._until(digest, resident=False))
        return arrivals, departures

    def _until(self, digest: str, *, resident: bool) -> float:
        return _milliseconds(lambda: _wait(lambda: (digest in self.runner.bank) is resident))


def _wait(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"The engine has not followed within {seconds:.0f} s.")
        time.sleep(TICK)


def _milliseconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
