"""Celery's settings, task names, and the embedded broker."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from kombu import Connection

from api.queue import QUEUES, CeleryQueue, TaskName, broker_options
from api.settings import Settings
from worker.app import make_celery


class TestTasks:
    def test_every_name_is_registered_with_its_payload(self, settings: Settings) -> None:
        celery = make_celery(settings)
        payloads = {TaskName.VALIDATE: ["job_id"], TaskName.TRAIN: ["job_id"], TaskName.SWEEP: []}
        payloads |= {TaskName.DELIVER: ["delivery_id"], TaskName.REPORT: ["report_id"], TaskName.TIDY: []}

        registered = {name for name in celery.tasks if not name.startswith("celery.")}

        assert registered == {name.value for name in TaskName}
        for name, payload in payloads.items():
            assert list(inspect.signature(celery.tasks[name.value].run).parameters) == payload
            assert QUEUES[name]

    def test_parents_stay_light(self) -> None:
        script = (
            "import sys, worker.app, worker.supervisor, worker.child\n"
            "heavy = {'torch', 'transformers', 'peft', 'fastapi'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr


class TestSettings:
    def test_a_late_or_lost_message_costs_nothing(self, settings: Settings) -> None:
        settings.broker_url = "redis://127.0.0.1:6379/9"
        conf = make_celery(settings).conf

        assert conf.task_acks_late
        assert conf.task_reject_on_worker_lost
        assert conf.worker_prefetch_multiplier == 1
        assert conf.task_ignore_result
        assert (conf.task_serializer, conf.accept_content) == ("json", ["json"])
        timeouts = {
            conf.broker_transport_options["visibility_timeout"],
            conf.result_backend_transport_options["visibility_timeout"],
            conf.visibility_timeout,
        }
        assert timeouts == {12 * 3600}
        assert conf.worker_enable_remote_control

    def test_beat_sweeps(self, settings: Settings) -> None:
        entry, tidy = make_celery(settings).conf.beat_schedule.values()

        assert tidy["task"] == TaskName.TIDY
        assert tidy["schedule"] == timedelta(hours=1)
        assert entry["task"] == TaskName.SWEEP
        assert entry["schedule"] == settings.sweep_interval == timedelta(seconds=1)
        assert entry["options"] == {"queue": "maintenance", "expires": 1.0}

    def test_api_and_worker_speak_to_the_same_folder(self, settings: Settings) -> None:
        options = make_celery(settings).conf.broker_transport_options

        assert options == broker_options(settings)
        assert Path(options["data_folder_in"]) == settings.home / "queue"
        assert not make_celery(settings).conf.worker_enable_remote_control


class TestEmbeddedBroker:
    def test_counts_what_waits(self, settings: Settings) -> None:
        queue = CeleryQueue(settings)
        for number in range(3):
            queue.send(TaskName.TRAIN, f"job-{number}")
        queue.send(TaskName.VALIDATE, "job-3")

        counts = {task: queue.waiting(task) for task in TaskName}
        # Tasks that share a queue wait together.
        assert counts.pop(TaskName.VALIDATE) == counts.pop(TaskName.REPORT) == 1
        assert counts.pop(TaskName.TRAIN) == 3
        assert set(counts.values()) == {0}

    def test_is_first_in_first_out_and_leaves_nothing_behind(self, settings: Settings) -> None:
        queue = CeleryQueue(settings)
        sent = [f"job-{number}" for number in range(20)]
        for job_id in sent:
            queue.send(TaskName.TRAIN, job_id)

        assert _consume(settings) == sent
        assert [path for path in settings.queue_dir.rglob("*") if path.is_file()] == []

    def test_each_message_reaches_one_of_many_consumers(self, settings: Settings) -> None:
        queue = CeleryQueue(settings)
        sent = [f"job-{number}" for number in range(100)]
        with ThreadPoolExecutor(5) as pool:
            consumers = [pool.submit(_consume, settings, patience=1.5) for _ in range(4)]
            for job_id in sent:
                queue.send(TaskName.TRAIN, job_id)
            received = [job_id for consumer in consumers for job_id in consumer.result(timeout=60)]

        assert sorted(received) == sorted(sent)

    def test_a_message_is_never_seen_half_written(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[list[str]] = []
        write_text = Path.write_text

        def look_while_writing(path: Path, content: str, encoding: str) -> int:
            written = write_text(path, content[:10], encoding=encoding)
            seen.append(_consume(settings))
            return write_text(path, content, encoding=encoding) if written else 0

        monkeypatch.setattr(Path, "write_text", look_while_writing)
        CeleryQueue(settings).send(TaskName.TRAIN, "job-0")

        assert seen == [[]]
        assert _consume(settings) == ["job-0"]


def _consume(settings: Settings, *, patience: float = 0.1) -> list[str]:
    """Job ids in the order in which they come, until none has come for ``patience`` seconds."""
    received: list[str] = []
    options = broker_options(settings) | {"polling_interval": 0.01}
    with Connection(transport="api.embedded_broker:Transport", transport_options=options) as connection:
        messages = connection.SimpleQueue("training")
        while True:
            try:
                message = messages.get(timeout=patience)
            except messages.Empty:
                return received
            received.append(message.payload[0][0])
            message.ack()


class TestCommandLine:
    def test_settings_come_from_the_environment_of_the_process(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "report"]
        environment = os.environ | {"UORA_HOME": str(tmp_path), "UORA_ENGINE_TOKEN": "a-secret"}
        report = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

        assert report.returncode == 0, report.stderr
        assert str(tmp_path / "queue") in report.stdout
        assert "a-secret" not in report.stdout + report.stderr
