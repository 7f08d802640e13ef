"""The whole service on one machine: ``python -m worker.up`` (``make up``).

Migrates the database, runs every process of the Procfile, the engine once for each base model, and on the first start
makes a project and a key. Ctrl-C stops them all; when one of them ends, the others are stopped too.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

import httpx
from alembic import command
from alembic.config import Config
from honcho import manager as honcho_manager
from honcho.environ import parse_procfile
from honcho.manager import Manager
from honcho.printer import Message, Printer
from sqlalchemy.orm import Session

import api.files.models
import api.jobs.models
import api.models.models  # noqa: F401 - the mappers need every table
from api.database import make_engine
from api.projects.repository import has_keys
from api.projects.service import create_api_key, ensure_project
from api.settings import DatabaseSettings, Settings

#: Beyond the trainer's own graces, until what still runs after Ctrl-C is killed.
STOP_SECONDS = 5.0
#: An engine's last word when it does not fit its base model, or this machine (`worker.engine.app`).
NOT_STARTED = "engine_not_started"
ROOT = Path(__file__).resolve().parent.parent
PROJECT = "default"

WELCOME = """
The service is ready on {url}. Your key, shown only now:

    {key}

In a browser: {url}/dashboard

With the openai client:

    from openai import OpenAI
    client = OpenAI(base_url="{url}/v1", api_key="{key}")
    file = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="{model}", training_file=file.id)

With curl:

    curl {url}/v1/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
      -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

On the command line:

    uora login --base-url {url} --api-key {key}

Ctrl-C stops it.
"""


def load_settings() -> Settings:
    """Settings of the environment; an engine token is made up and kept below home if none is given."""
    if "UORA_ENGINE_TOKEN" not in os.environ:
        os.environ["UORA_ENGINE_TOKEN"] = _kept_token(DatabaseSettings().home / "engine_token")
    return Settings()


def _kept_token(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()


def migrate(settings: Settings) -> None:
    """Bring the database to the newest migration, as ``alembic upgrade head`` does."""
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", settings.database_url.replace("%", "%%"))
    command.upgrade(config, "head")


def first_key(settings: Settings) -> str | None:
    """Make the first project and its key, which may do everything; None if there is a key already."""
    with Session(make_engine(settings.database_url)) as session, session.begin():
        project = ensure_project(session, name=PROJECT)
        if has_keys(session, project.id):
            return None
        return create_api_key(session, project, name="first key", organization_wide=True)


class Reporter(Printer):  # type: ignore[misc] # honcho has no types
    """Prints what the processes say, and keeps why engines did not start, which is soon far up on the screen."""

    def __init__(self, output: TextIO) -> None:
        super().__init__(output)
        self.refusals: dict[str, str] = {}  # by the process

    def write(self, message: Message) -> None:
        """Print a line of a process."""
        super().write(message)
        text = message.data.decode(errors="replace") if isinstance(message.data, bytes) else message.data
        if NOT_STARTED in text:
            self.refusals[message.name] = _reason(text)


def _reason(line: str) -> str:
    """The error in a log line, as the engines write them where their output is no terminal."""
    try:
        return str(json.loads(line)["error"])
    except (ValueError, KeyError, TypeError):
        return line.strip()


def explain(engines: Sequence[EngineProcess], refusals: Mapping[str, str]) -> str:
    """Which engines did not start, and why; empty if all did."""
    return "".join(
        f"\nThe engine of the base model {engine.base_model!r} ({engine.name}) did not start:\n\n"
        f"    {refusals[engine.name]}\n"
        for engine in engines
        if engine.name in refusals
    )


@dataclass(frozen=True)
class EngineProcess:
    """An engine to start: its name among the processes, its base model, and where it listens."""

    name: str
    base_model: str
    host: str
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What tells it so."""
        return {
            "UVICORN_HOST": self.host,
            "UVICORN_PORT": str(self.port),
            "UORA_ENGINE_ADVERTISE_URL": f"http://{self.host}:{self.port}",
            "UORA_ENGINE_BASE_MODEL": self.base_model,
        }


def plan_engines(settings: Settings) -> list[EngineProcess]:
    """``engine_replicas`` engines for each base model, or for the one that is chosen, on ports one after the other."""
    chosen = "engine_base_model" in settings.model_fields_set
    base_models = [settings.engine_base_model] if chosen else list(settings.base_models)
    served = [base_model for base_model in base_models for _ in range(settings.engine_replicas)]
    first = urlsplit(settings.engine_advertise_url)
    return [
        EngineProcess(
            name="engine" if len(served) == 1 else f"engine.{number}",
            base_model=base_model,
            host=first.hostname or "127.0.0.1",
            port=(first.port or 80) + number - 1,
        )
        for number, base_model in enumerate(served, start=1)
    ]


def make_manager(*, host: str, port: int, settings: Settings, printer: Printer | None = None) -> Manager:
    """All processes of the Procfile, not started yet; its engine as often as `plan_engines` says."""
    manager = Manager(printer)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    engines = plan_engines(settings)
    threads = {"UORA_TORCH_THREADS": str(threads_per_engine(settings, engines=len(engines)))}
    processes = parse_procfile((ROOT / "Procfile").read_text()).processes
    copies: dict[str, dict[str, dict[str, str]]] = {
        **_metrics_ports(settings, [name for name, line in processes.items() if line.startswith("celery ")]),
        "api": {"api": {"UVICORN_HOST": host, "UVICORN_PORT": str(port)}},
        "engine": {engine.name: engine.environment | threads for engine in engines},
    }
    for process, line in processes.items():
        for name, addition in copies.get(process, {process: {}}).items():
            env = {**os.environ, "PATH": path, **addition}
            manager.add_process(name, f"exec {line}", env=env, cwd=str(ROOT))  # exec: no shell between us and it
    return manager


def _metrics_ports(settings: Settings, processes: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """A port for each process that has none else, counted up from the one that is set."""
    if not settings.metrics_port:
        return {}
    ports = enumerate(processes, start=settings.metrics_port)
    return {process: {process: {"UORA_METRICS_PORT": str(port)}} for port, process in ports}


def threads_per_engine(settings: Settings, *, engines: int) -> int:
    """torch threads of each engine: as set, else its share of the cores; 0 leaves a single one to torch's choice."""
    if settings.torch_threads or engines == 1:
        return settings.torch_threads
    return max(1, (os.cpu_count() or 1) // engines)


def check_free(host: str, port: int) -> None:
    """Leave with a plain message if the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            sys.exit(f"Port {port} on {host} is taken ({error.strerror}). Stop what uses it, or choose another port.")


def wait_ready(url: str, *, seconds: float) -> bool:
    """Whether the api and everything behind it became ready in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.5)
    return False


def _welcome(settings: Settings, url: str) -> None:
    if not wait_ready(url, seconds=600):
        return
    key = first_key(settings)
    if key is None:
        text = f"\nThe service is ready on {url}; your key is the one shown at the first start. Ctrl-C stops it.\n"
    else:
        text = WELCOME.format(url=url, key=key, model=settings.engine_base_model)
    print(text, flush=True)  # noqa: T201 # a command line's own output


def main(given: Sequence[str] | None = None) -> None:
    """Run until Ctrl-C, or until a process ends; ``given`` are its arguments, else the process's."""
    parser = argparse.ArgumentParser(description="Run the whole service on this machine.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args(given)
    settings = load_settings()
    check_free(arguments.host, arguments.port)
    for engine in plan_engines(settings):
        check_free(engine.host, engine.port)
    migrate(settings)
    # honcho has no other place for it; its 5 seconds would cost a trainer the step it is in, and its state.
    honcho_manager.KILL_WAIT = (settings.pause_grace + settings.stop_grace).total_seconds() + STOP_SECONDS
    reporter = Reporter(sys.stdout)
    manager = make_manager(host=arguments.host, port=arguments.port, settings=settings, printer=reporter)
    url = f"http://{arguments.host}:{arguments.port}"
    threading.Thread(target=_welcome, args=(settings, url), daemon=True).start()
    manager.loop()
    print(explain(plan_engines(settings), reporter.refusals), end="", file=sys.stderr, flush=True)  # noqa: T201 # as above
    interrupted = manager.returncode == 130
    sys.exit(0 if interrupted else manager.returncode)


if __name__ == "__main__":
    main()
