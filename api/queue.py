"""Task names, the one contract between api and worker. A message carries the id of a row and nothing else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from celery import Celery

from api import tracing
from api.settings import Settings

#: Redis hands a message out again when it is not acknowledged for so long, while the task may still run.
#: The lease makes that harmless, and the sweeper rings for lost messages much earlier, so it may be long.
VISIBILITY_TIMEOUT_SECONDS = 12 * 3600


class TaskName(StrEnum):
    """Tasks the worker registers."""

    VALIDATE = "files.validate"
    REPORT = "files.report"
    TRAIN = "training.run"
    SWEEP = "maintenance.sweep"
    TIDY = "maintenance.tidy"
    DELIVER = "webhooks.deliver"


#: Which queue a task waits in: training has its own, so that a long job never holds up a validation, and webhooks
#: too, whose receivers may take their time.
QUEUES: dict[TaskName, str] = {
    TaskName.VALIDATE: "files",
    TaskName.REPORT: "files",
    TaskName.TRAIN: "training",
    TaskName.SWEEP: "maintenance",
    TaskName.TIDY: "maintenance",
    TaskName.DELIVER: "webhooks",
}


class TaskQueue(Protocol):
    """Rings for a job. Sent after the commit; a lost message is sent again by the sweeper."""

    def send(self, task: TaskName, job_id: str) -> None:
        """Ring for ``job_id``."""


def configure_broker(celery: Celery, settings: Settings) -> None:
    """Point ``celery`` at the broker: the same on the sending and on the receiving side."""
    celery.conf.broker_url = settings.broker_url
    celery.conf.broker_transport_options = broker_options(settings)
    if is_embedded(settings):
        celery.conf.broker_url = "filesystem://localhost//"  # kombu warns about an address without a host
        celery.conf.broker_transport = "api.embedded_broker:Transport"


def is_embedded(settings: Settings) -> bool:
    """Whether the broker is a folder of this machine instead of a server."""
    return settings.broker_url.startswith("filesystem:")


def broker_options(settings: Settings) -> dict[str, Any]:
    """kombu's transport options: folders for the embedded broker, the visibility timeout for Redis."""
    if not is_embedded(settings):
        return {"visibility_timeout": VISIBILITY_TIMEOUT_SECONDS}
    folder: Path = settings.queue_dir
    folder.mkdir(parents=True, exist_ok=True)
    # In and out are one folder: every process of this machine reads what any of them wrote.
    return {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "control_folder": str(folder / "control"),
        "polling_interval": 0.25,
    }


def _producer_timeouts(settings: Settings) -> dict[str, Any]:
    """A broker that does not answer must not hold a request. Consumers block on purpose and have no such limit."""
    if not settings.broker_url.startswith("redis"):
        return {}
    return {"socket_connect_timeout": 2.0, "socket_timeout": 5.0, "max_retries": 1}


class CeleryQueue:
    """``TaskQueue`` over Celery's producer half; it needs none of the worker's code."""

    def __init__(self, settings: Settings) -> None:
        self._celery = Celery()
        self._celery.conf.task_ignore_result = True
        configure_broker(self._celery, settings)
        self._celery.conf.broker_transport_options |= _producer_timeouts(settings)
        # A request waits for this; the sweeper rings again for what could not be sent.
        self._celery.conf.task_publish_retry = False

    def send(self, task: TaskName, job_id: str) -> None:
        """Put the message on the task's queue."""
        with tracing.span(f"send {task.value}", kind="producer", uora_id=job_id):
            self._celery.send_task(task.value, args=[job_id], queue=QUEUES[task])

    def waiting(self, task: TaskName) -> int:
        """Messages in the task's queue that no worker has taken yet."""
        with self._celery.connection_for_read() as connection, connection.channel() as channel:
            declared = channel.queue_declare(queue=QUEUES[task])
            return int(declared.message_count)
