"""An engine whose base model it cannot serve: it ends, says why, and nobody is sent to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sqlalchemy import select

from api.database import make_engine, make_sessions
from api.engines.models import EngineReplica
from scripts.demo import free_port
from tests.api.support import ROOT, empty_database, migrate
from tests.chaos.test_replicas import engine_process
from tests.tiny import make_tiny_causal

STARTUP_FAILED = 3  # uvicorn's exit status


def make_gemma2(folder: Path) -> Path:
    return make_tiny_causal(
        folder / "gemma2", "gemma2", intermediate_size=96, head_dim=16, layer_types=["full_attention"] * 2
    )


def environment_of(folder: Path, database_url: str, model: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("UORA_")} | {
        "UORA_HOME": str(folder),
        "UORA_DATABASE_URL": database_url,
        "UORA_CACHE_DIR": str(folder / "cache"),
        "UORA_BASE_MODELS": json.dumps({"tiny": f"path:{model}"}),
        "UORA_ENGINE_TOKEN": "secret",
        "UORA_ENGINE_MAX_TOKENS": "256",
        "UORA_ENGINE_ADAPTER_MEMORY": "0",
        "UORA_ENGINE_HEARTBEAT_INTERVAL": "PT0.2S",
        "UORA_DTYPE": "float32",
        "UORA_TORCH_THREADS": "1",
    }


def test_an_engine_that_does_not_fit_its_model_ends(tmp_path: Path) -> None:
    with empty_database("sqlite", tmp_path) as database_url:
        migrate(database_url)
        environment = environment_of(tmp_path, database_url, make_gemma2(tmp_path))
        log = tmp_path / "engine.log"
        with engine_process(environment, f"http://127.0.0.1:{free_port()}", log) as process:
            assert process.wait(60) == STARTUP_FAILED
        lines = [line for line in log.read_text().splitlines() if "engine_not_started" in line]
        (event,) = (json.loads(line) for line in lines if line.startswith("{"))
        assert (event["event"], event["level"], event["base_model"]) == ("engine_not_started", "error", "tiny")
        assert event["code"] == "base_model_not_servable"
        assert "softcap" in event["error"]
        database = make_engine(database_url)
        with make_sessions(database)() as session:
            assert session.scalars(select(EngineReplica)).all() == []
        database.dispose()


def test_make_up_says_which_engine_did_not_start_and_why(tmp_path: Path) -> None:
    with empty_database("sqlite", tmp_path) as database_url:
        engine_port = free_port()
        environment = environment_of(tmp_path, database_url, make_gemma2(tmp_path)) | {
            "UORA_ENGINE_ADVERTISE_URL": f"http://127.0.0.1:{engine_port}"
        }
        command = [sys.executable, "-m", "worker.up", "--port", str(free_port())]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == STARTUP_FAILED
    explained = done.stderr[done.stderr.rindex("The engine of the base model 'tiny' (engine) did not start:") :]
    assert "'gemma2'" in explained
    assert "softcap" in explained
