"""The Celery application: ``celery -A worker.app worker ...``.

| process | command |
|---|---|
| trainer | ``celery -A worker.app worker -Q training --pool threads -c 1 -n trainer@%h`` |
| sweeper | ``celery -A worker.app worker -B -Q files,maintenance --pool threads -c 1 -n sweeper@%h`` |
| webhooks | ``celery -A worker.app worker -Q webhooks --pool threads -c 8 -n webhooks@%h`` |
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, wraps
from typing import Any

from celery import Celery
from celery.signals import (
    beat_embedded_init,
    celeryd_init,
    setup_logging,
    worker_init,
    worker_shutdown,
    worker_shutting_down,
)
from structlog.contextvars import bound_contextvars

from api.queue import QUEUES, VISIBILITY_TIMEOUT_SECONDS, TaskName, configure_broker, is_embedded
from api.settings import Settings
from api.telemetry import configure_logging, is_json
from api.tracing import configure_tracing, stop_tracing
from worker import context
from worker.metrics import serve_metrics, timed
from worker.tasks import files, maintenance, training, webhooks

TIDY_INTERVAL = timedelta(hours=1)

TASKS: dict[TaskName, Callable[..., None]] = {
    TaskName.VALIDATE: files.run,
    TaskName.REPORT: files.report,
    TaskName.TRAIN: training.run,
    TaskName.SWEEP: maintenance.run,
    TaskName.TIDY: maintenance.run_tidy,
    TaskName.DELIVER: webhooks.run,
}
#: What log lines call the id that a message carries.
ID_NAMES = {
    TaskName.VALIDATE: "job_id",
    TaskName.TRAIN: "job_id",
    TaskName.REPORT: "report_id",
    TaskName.DELIVER: "delivery_id",
}


def make_celery(settings: Settings) -> Celery:
    """The application with every task and beat's schedule. Opens nothing."""
    celery = Celery("uora")
    configure_broker(celery, settings)
    _configure(celery, settings)
    for name, run in TASKS.items():
        celery.task(name=name.value)(_observed(name, run))
    return celery


def _observed(name: TaskName, run: Callable[..., None]) -> Callable[..., None]:
    """``run``, counted, whose log lines name the task and what it is about."""

    @wraps(run)
    def observed(*ids: str) -> None:
        about = {ID_NAMES[name]: ids[0]} if ids else {}
        with bound_contextvars(task=name.value, **about), timed(name.value):
            run(*ids)

    return observed


def _configure(celery: Celery, settings: Settings) -> None:
    interval = settings.sweep_interval
    visibility = {"visibility_timeout": VISIBILITY_TIMEOUT_SECONDS}
    celery.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,  # the database is the truth
        result_expires=None,  # nothing to expire, so no daily task for it
        # A message is gone when its task is done: one whose worker was killed comes back.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # A busy trainer must not sit on a message that an idle one could take.
        worker_prefetch_multiplier=1,
        # Training runs in a child process, so a thread is enough; and embedded beat needs no second pool.
        worker_pool="threads",
        worker_concurrency=1,
        # Redis takes the shortest of the three, an unset default included.
        result_backend_transport_options=visibility,
        visibility_timeout=VISIBILITY_TIMEOUT_SECONDS,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # The lease, not the connection, says who works on a job.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Needs broadcasts: in a folder, those to workers that died would pile up for ever.
        worker_enable_remote_control=not is_embedded(settings),
        # Kept in memory: with one short interval there is nothing worth a file, which would be pickled too.
        beat_scheduler="celery.beat:Scheduler",
        beat_schedule={
            "sweep": {
                "task": TaskName.SWEEP.value,
                "schedule": interval,
                # A sweeper that was busy for long has one sweep to make up, not one for each interval.
                "options": {"queue": QUEUES[TaskName.SWEEP], "expires": interval.total_seconds()},
            },
            "tidy": {
                "task": TaskName.TIDY.value,
                "schedule": TIDY_INTERVAL,
                "options": {"queue": QUEUES[TaskName.TIDY], "expires": TIDY_INTERVAL.total_seconds()},
            },
        },
    )


def _stop_training(**_: Any) -> None:
    context.STOPPING.set()


def _configure_logging(**_: Any) -> None:
    """Instead of Celery's own."""
    settings = Settings()
    configure_logging(level=settings.log_level, format=settings.log_format)


def _begin_logging(instance: Any, **_: Any) -> None:
    """Before Celery says anything; whoever reads lines of JSON cannot read its picture of itself."""
    _configure_logging()
    if is_json(Settings().log_format):
        instance.quiet = True


def _begin_telling(sender: Any, **_: Any) -> None:
    """Before the worker runs, and apart from the beat that it may start."""
    try:
        serve_metrics(Settings())
        configure_tracing(str(sender.hostname).partition("@")[0])
    except RuntimeError as error:  # Celery would only log it
        sys.exit(f"The worker did not start: {error}")


def _stop_telling(**_: Any) -> None:
    stop_tracing()


def _leave_with_worker(**_: Any) -> None:
    """Embedded beat is a process of its own; when the worker is killed, nothing else would end it."""
    threading.Thread(target=_exit_when_orphaned, args=(os.getppid(),), daemon=True).start()


def _exit_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


setup_logging.connect(_configure_logging)
celeryd_init.connect(_begin_logging)
worker_init.connect(_begin_telling)
worker_shutdown.connect(_stop_telling)
worker_shutting_down.connect(_stop_training)
beat_embedded_init.connect(_leave_with_worker)


@cache
def _app() -> Celery:
    return make_celery(Settings())


def __getattr__(name: str) -> Any:
    """``app``, made when Celery's command line asks for it: settings are read then, not at import."""
    if name == "app":
        return _app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
