"""The producer's half of the queue, and the settings it stands on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from api.queue import QUEUES, CeleryQueue, TaskName
from api.settings import DatabaseSettings, Settings


def make_settings(home: Path, **values: object) -> Settings:
    """Settings that take nothing from the machine."""
    return Settings(_env_file=None, home=home, engine_token="x", **values)  # type: ignore[arg-type]


def test_a_message_lands_in_the_embedded_broker(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    CeleryQueue(settings).send(TaskName.VALIDATE, "ftjob-1")
    message = next(settings.queue_dir.glob(f"*.{QUEUES[TaskName.VALIDATE]}.msg"))
    assert json.loads(message.read_text())["headers"]["task"] == "files.validate"


def test_a_broker_that_is_down_is_told_soon(tmp_path: Path) -> None:
    queue = CeleryQueue(make_settings(tmp_path, broker_url="redis://127.0.0.1:9/0"))
    started = time.monotonic()
    with pytest.raises(Exception, match=r"127\.0\.0\.1:9"):
        queue.send(TaskName.VALIDATE, "ftjob-1")
    assert time.monotonic() - started < 10


def test_every_task_has_a_queue() -> None:
    assert set(QUEUES) == set(TaskName)


def test_paths_lie_below_home(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path / 'uora.db'}"
    assert settings.storage_dir == tmp_path / "files"
    assert make_settings(tmp_path, storage_dir="/elsewhere").storage_dir == Path("/elsewhere")
    assert DatabaseSettings(_env_file=None, home=tmp_path).database_url == settings.database_url


def test_the_engine_token_has_no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UORA_ENGINE_TOKEN", raising=False)
    with pytest.raises(ValidationError, match="engine_token"):
        Settings(_env_file=None, home=tmp_path)
