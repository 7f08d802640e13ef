"""Two real engines of one base model behind the api; one is killed while it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest

from api.database import make_engine, make_sessions
from api.engines import repository
from api.main import create_app
from api.settings import Settings
from scripts.demo import free_port
from tests.api.support import ROOT, RecordingQueue, Tenant, empty_database, make_tenant, migrate, serve
from tests.tiny import make_tiny_llama
from tests.worker.support import tail, wait_until

HI: list[Any] = [{"role": "user", "content": "hello there"}]
TTL = timedelta(seconds=2)
#: Long enough that an engine is killed in the middle of them.
TOKENS = 1500


@dataclass
class Engines:
    """Two engine processes and the api before them."""

    url: str
    tenant: Tenant
    sessions: Any
    processes: dict[str, subprocess.Popen[bytes]]
    logs: dict[str, Path]

    def live(self) -> dict[str, int]:
        """URL -> running sequences, of the live ones."""
        with self.sessions() as session:
            return {row.url: row.running for row, _ in repository.live(session, ttl=TTL)}

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.tenant.key, max_retries=0, timeout=60)


@dataclass
class Answer:
    """What a client received."""

    began: Event = field(default_factory=Event)
    text: str = ""
    finish_reason: str | None = None
    error: openai.APIError | None = None

    def receive(self, client: openai.OpenAI) -> None:
        try:
            for chunk in client.chat.completions.create(
                model="tiny", messages=HI, temperature=0, max_tokens=TOKENS, stream=True
            ):
                self.text += chunk.choices[0].delta.content or ""
                self.finish_reason = chunk.choices[0].finish_reason
                if self.text:
                    self.began.set()
        except openai.APIError as error:
            self.error = error
        finally:
            self.began.set()


@contextmanager
def engine_process(environment: dict[str, str], url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """As the Procfile starts it."""
    command = [sys.executable, "-m", "uvicorn", "--factory", "worker.engine.app:create_app"]
    host, _, port = url.removeprefix("http://").partition(":")
    env = environment | {"UVICORN_HOST": host, "UVICORN_PORT": port, "UORA_ENGINE_ADVERTISE_URL": url}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(params=[pytest.param("postgresql", marks=pytest.mark.postgres)])  # what several machines share
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engines]:
    model = make_tiny_llama(tmp_path / "tiny", max_tokens=4096)
    with ExitStack() as stack:
        database_url = stack.enter_context(empty_database(request.param, tmp_path))
        migrate(database_url)
        settings = Settings(
            _env_file=None,
            home=tmp_path,
            database_url=database_url,
            base_models={"tiny": f"path:{model}"},
            engine_token="secret",
            engine_ttl=TTL,
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UORA_")} | {
            "UORA_HOME": str(tmp_path),
            "UORA_DATABASE_URL": database_url,
            "UORA_CACHE_DIR": str(tmp_path / "cache"),
            "UORA_BASE_MODELS": json.dumps(settings.base_models),
            "UORA_ENGINE_TOKEN": "secret",
            "UORA_ENGINE_MAX_TOKENS": "4096",
            "UORA_ENGINE_ADAPTER_MEMORY": "0",
            "UORA_ENGINE_HEARTBEAT_INTERVAL": "PT0.2S",
            "UORA_DTYPE": "float32",
            "UORA_TORCH_THREADS": "1",
        }
        logs = {f"http://127.0.0.1:{free_port()}": tmp_path / f"engine-{number}.log" for number in range(2)}
        processes = {url: stack.enter_context(engine_process(environment, url, log)) for url, log in logs.items()}
        database = make_engine(database_url)
        stack.callback(database.dispose)
        sessions = make_sessions(database)
        with sessions.begin() as session:
            tenant = make_tenant(session, "Acme")
        url = stack.enter_context(serve(create_app(settings, queue=RecordingQueue())))
        found = Engines(url, tenant, sessions, processes, logs)
        wait_until(
            lambda: len(found.live()) == 2, seconds=90, what=f"two engines: {[tail(log) for log in logs.values()]}"
        )
        yield found


def test_a_killed_engine_takes_only_its_own_streams_with_it(engines: Engines) -> None:
    with ThreadPoolExecutor(8) as pool:
        client = engines.client()
        answers = [Answer() for _ in range(6)]
        received = []
        for answer in answers:
            received.append(pool.submit(answer.receive, client))
            assert answer.began.wait(20)
        wait_until(lambda: min(engines.live().values()) > 0, what="streams on both")
        killed, survivor = engines.processes
        engines.processes[killed].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()

        # While the dead engine's row still counts as live, nobody is sent there in vain.
        short = [
            client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=4) for _ in range(4)
        ]
        assert time.monotonic() - killed_at < 10
        for future in received:
            future.result(60)

    broken = [answer for answer in answers if answer.error]
    whole = [answer for answer in answers if not answer.error]
    assert broken, "no stream was on the killed engine"
    assert whole, "no stream was on the other"
    assert {answer.error.code for answer in broken if answer.error} == {"engine_interrupted"}
    expected = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=TOKENS).choices[0]
    assert {(answer.text, answer.finish_reason) for answer in whole} == {
        (expected.message.content, expected.finish_reason)
    }
    text = expected.message.content or ""
    assert all(text.startswith(answer.text) and len(answer.text) < len(text) for answer in broken)
    assert all(text.startswith(answer.choices[0].message.content or "no") for answer in short)

    wait_until(lambda: list(engines.live()) == [survivor], what="the end of the dead engine", seconds=10)
    ready = httpx.get(f"{engines.url}/readyz").json()
    assert ready["status"] == "ready"
    # One that ends as it should is gone at once, and then there is none.
    engines.processes[survivor].send_signal(signal.SIGTERM)
    assert engines.processes[survivor].wait(20) == -signal.SIGTERM
    assert engines.live() == {}
    time.sleep(0.6)  # the api's own knowledge of them
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=HI)
    assert caught.value.code == "no_engine"
