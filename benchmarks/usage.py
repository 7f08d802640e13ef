"""What it costs an answer to be written down: in a transaction of its own, and with all others of its second.

Both on SQLite and, where one answers on 127.0.0.1, on PostgreSQL, of eight projects at once with one key and model
each, and of one. Milliseconds depend on the machine; what counts is their ratio.

    python -m benchmarks.usage            half a minute
    python -m benchmarks.usage --smoke    in its short form
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
from rich.console import Console
from sqlalchemy.orm import Session, sessionmaker

from api.caller import Caller
from api.database import Base, make_engine, make_sessions
from api.usage import repository
from api.usage.ledger import UsageLedger
from api.usage.models import Operation
from api.usage.repository import Amounts, UsageKey, present_minute

POSTGRES = "postgresql://postgres@127.0.0.1:5432"
#: Answers that end at the same time.
CONCURRENT = 16
PROJECTS = (1, 8)
#: Of each answer, in a batch.
TOKENS = 100
console = Console(stderr=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few answers only")
    answers = 64 if parser.parse_args().smoke else 2000
    result: dict[str, dict[str, float]] = {}
    for name in ("sqlite", "postgresql"):
        with database(name) as url:
            if url is None:
                console.print(f"{name}: does not answer")
                continue
            result[name] = measure(url, answers)
            console.print(name, result[name])
    print(json.dumps(result))


@contextmanager
def database(name: str) -> Iterator[str | None]:
    """An empty one; None if there is none."""
    if name == "sqlite":
        with tempfile.TemporaryDirectory(prefix="uora-usage-") as folder:
            yield f"sqlite:///{folder}/rows.db"
        return
    made = f"uora_bench_{secrets.token_hex(4)}"
    with suppress(psycopg.OperationalError):
        with psycopg.connect(f"{POSTGRES}/postgres", autocommit=True, connect_timeout=3) as connection:
            connection.execute(f'CREATE DATABASE "{made}"'.encode())
            try:
                yield f"{POSTGRES.replace('postgresql', 'postgresql+psycopg')}/{made}"
            finally:
                connection.execute(f'DROP DATABASE "{made}" WITH (FORCE)'.encode())
        return
    yield None


def measure(url: str, answers: int) -> dict[str, float]:
    """Milliseconds that an answer waits for its own transaction, and that a batch of as many takes, token by token."""
    engine = make_engine(url)
    Base.metadata.create_all(engine)
    sessions = make_sessions(engine)
    try:
        found = {}
        for projects in PROJECTS:
            alone = asyncio.run(write_each(sessions, answers, projects))
            together, adding = asyncio.run(write_together(sessions, answers, projects))
            found |= {
                f"own_transaction_median_ms_{projects}": statistics.median(alone),
                f"own_transaction_p99_ms_{projects}": sorted(alone)[int(0.99 * (len(alone) - 1))],
                f"batch_ms_{projects}": together,
                f"microseconds_of_a_token_{projects}": adding,
            }
        return {name: round(value, 3) for name, value in found.items()}
    finally:
        engine.dispose()


async def write_each(sessions: sessionmaker[Session], answers: int, projects: int) -> list[float]:
    """Each answer by itself, so many at a time; milliseconds of each."""
    took: list[float] = []

    def write(number: int) -> None:
        key = UsageKey(f"project-{number % projects}", present_minute(), "key", "model", Operation.CHAT)
        with sessions.begin() as session:
            repository.add(session, {key: Amounts(requests=1, output_tokens=TOKENS)})

    async def some(first: int) -> None:
        for number in range(first, answers, CONCURRENT):
            began = time.perf_counter()
            await asyncio.to_thread(write, number)
            took.append(1000 * (time.perf_counter() - began))

    await asyncio.gather(*map(some, range(CONCURRENT)))
    return took


async def write_together(sessions: sessionmaker[Session], answers: int, projects: int) -> tuple[float, float]:
    """All answers in one batch: milliseconds of its writing, and microseconds of counting each token."""
    ledger = UsageLedger(sessions)
    callers = [Caller(f"project-{number}", "slug", "key") for number in range(projects)]
    began = time.perf_counter()
    for number in range(answers):
        for _ in range(TOKENS):
            ledger.add(callers[number % projects], "model", Operation.CHAT, output_tokens=1)
    counted = time.perf_counter()
    if not await ledger.write():
        raise RuntimeError("the batch was not written")
    return 1000 * (time.perf_counter() - counted), 1e6 * (counted - began) / (answers * TOKENS)


if __name__ == "__main__":
    main()
