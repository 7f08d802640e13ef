"""Two engines and two apis are restarted one after the other while clients go on asking: nobody notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.database import make_engine, make_sessions
from api.engines import repository
from scripts.demo import free_port
from tests.api.support import NO_TLS, ROOT, empty_database, make_tenant, migrate
from tests.tiny import make_tiny_llama
from tests.worker.support import tail, wait_until

HI: list[Any] = [{"role": "user", "content": "hello there"}]
ENGINE, API = "worker.engine.app:create_app", "api.main:create_app"
#: Longer than the balancer takes to see that an api is not ready any more.
DRAIN = "PT1.2S"
LOOK_SECONDS = 0.5
#: Of an answer that is under way when a process is told to stop, and of the others.
LONG, SHORT = 200, 8


@dataclass
class Process:
    """A server that can be restarted at the same address."""

    app: str
    url: str
    log: Path
    environment: dict[str, str]
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        host, _, port = self.url.removeprefix("http://").partition(":")
        env = self.environment | {"UVICORN_HOST": host, "UVICORN_PORT": port, "UORA_ENGINE_ADVERTISE_URL": self.url}
        command = [sys.executable, "-m", "uvicorn", "--factory", self.app, "--timeout-graceful-shutdown", "30"]
        with self.log.open("ab") as output:
            self.running = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)

    def stop(self) -> int:
        """Its exit status, once it has ended as it should."""
        assert self.running is not None
        self.running.send_signal(signal.SIGTERM)
        try:
            return self.running.wait(30)
        except subprocess.TimeoutExpired:
            self.running.kill()
            raise

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5, verify=NO_TLS).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self) -> None:
        """Look now and then: a start takes seconds of a processor, and shall not take more."""
        deadline = time.monotonic() + 60
        while not self.is_ready():
            assert time.monotonic() < deadline, tail(self.log)
            time.sleep(LOOK_SECONDS)


class Balancer(httpx.BaseTransport):
    """Sends each request to the next of the apis whose ``/readyz`` said so a moment ago, and none twice."""

    def __init__(self, apis: list[Process]) -> None:
        self._apis = apis
        self._ready = list(apis)
        self._turns = count()
        self._inner = httpx.HTTPTransport(verify=NO_TLS)
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        ready = self._ready
        chosen = httpx.URL(ready[next(self._turns) % len(ready)].url)
        request.url = request.url.copy_with(host=chosen.host, port=chosen.port)
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._closed.set()
        self._inner.close()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self._ready = [api for api in self._apis if api.is_ready()]


@dataclass
class Fleet:
    """Two of each, a client before them, and what it received."""

    engines: list[Process]
    apis: list[Process]
    sessions: Any
    client: openai.OpenAI
    stopped: threading.Event = field(default_factory=threading.Event)
    texts: list[str] = field(default_factory=list)

    def live(self) -> set[str]:
        with self.sessions() as session:
            return {row.url for row, _ in repository.live(session, ttl=timedelta(seconds=5))}

    def ask_again_and_again(self) -> None:
        """Until `stopped`; raises what the client does."""
        while not self.stopped.is_set():
            (choice,) = self.client.chat.completions.create(
                model="tiny", messages=HI, temperature=0, max_tokens=SHORT
            ).choices
            self.texts.append(choice.message.content or "")
            time.sleep(0.2)

    def begin(self) -> Iterator[str]:
        """A long answer, whose first text is there."""
        stream = self.client.chat.completions.create(
            model="tiny", messages=HI, temperature=0, max_tokens=LONG, stream=True
        )
        texts = (chunk.choices[0].delta.content or "" for chunk in stream)
        first = next(text for text in texts if text)
        return chain([first], texts)


@contextmanager
def running(processes: list[Process]) -> Iterator[None]:
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            if process.running is not None and process.running.poll() is None:
                process.running.kill()
                process.running.wait()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    model = make_tiny_llama(tmp_path / "tiny", max_tokens=512)
    with ExitStack() as stack:
        database_url = stack.enter_context(empty_database("sqlite", tmp_path))
        migrate(database_url)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UORA_")} | {
            "UORA_HOME": str(tmp_path),
            "UORA_DATABASE_URL": database_url,
            "UORA_CACHE_DIR": str(tmp_path / "cache"),
            "UORA_BASE_MODELS": json.dumps({"tiny": f"path:{model}"}),
            "UORA_ENGINE_TOKEN": "secret",
            "UORA_ENGINE_HEARTBEAT_INTERVAL": "PT0.5S",
            "UORA_DTYPE": "float32",
            "UORA_TORCH_THREADS": "1",
            "UORA_LOG_LEVEL": "WARNING",
        }
        engines, apis = (
            [
                Process(
                    app, f"http://127.0.0.1:{free_port()}", tmp_path / f"{app[:3]}-{number}.log", environment | more
                )
                for number in range(2)
            ]
            for app, more in ((ENGINE, {}), (API, {"UORA_DRAIN_DELAY": DRAIN}))
        )
        stack.enter_context(running([*engines, *apis]))
        database = make_engine(database_url)
        stack.callback(database.dispose)
        sessions = make_sessions(database)
        with sessions.begin() as session:
            key = make_tenant(session, "Acme").key
        for process in (*engines, *apis):
            process.wait_ready()
        http = stack.enter_context(httpx.Client(transport=Balancer(apis)))
        # Without retries: each failure is seen.
        client = openai.OpenAI(base_url="http://balancer/v1", api_key=key, max_retries=0, timeout=60, http_client=http)
        fleet = Fleet(engines, apis, sessions, client)
        wait_until(lambda: len(fleet.live()) == 2, what=f"{[tail(engine.log) for engine in engines]}", seconds=60)
        yield fleet


def test_no_request_fails_while_everything_is_restarted(fleet: Fleet) -> None:
    long_texts: set[str] = set()
    with ThreadPoolExecutor(4) as pool:
        asking = pool.submit(fleet.ask_again_and_again)
        try:
            wait_until(lambda: len(fleet.texts) >= 3, what="first answers")
            for process in (*fleet.engines, *fleet.apis):
                before = len(fleet.texts)
                begun = [fleet.begin() for _ in range(2)]  # one on each api, and one on each engine
                ended = pool.submit(process.stop)
                if process.app == ENGINE:
                    # At once, and not when its last answer is complete.
                    wait_until(lambda url=process.url: url not in fleet.live(), what="its leaving", seconds=2)  # type: ignore[misc]
                long_texts |= {"".join(texts) for texts in begun}
                assert ended.result(40) == -signal.SIGTERM
                process.start()
                process.wait_ready()
                wait_until(lambda: len(fleet.live()) == 2, what=tail(process.log), seconds=60)
                wait_until(lambda before=before: len(fleet.texts) > before + 2, what="answers meanwhile")  # type: ignore[misc]
        finally:
            fleet.stopped.set()
        asking.result(60)
    assert len(set(fleet.texts)) == len(long_texts) == 1
    assert len(long_texts.pop()) > len(fleet.texts[0])
