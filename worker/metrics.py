"""What a Celery process counts, and where it tells it: on a port of its own, if ``UORA_METRICS_PORT`` gives it one.

Celery has no HTTP server. What the database knows, every api process tells; these are things that only the process
itself knows, and that are none of its job's rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import Counter, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from api.metrics.exposition import REFUSAL, may_read, new_registry
from api.queue import TaskName
from api.settings import Settings

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

#: From a doorbell that rang in vain to a training of hours.
TASK_BUCKETS = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 28800.0)

REGISTRY = new_registry()
TASKS = Histogram(
    "uora_task_seconds",
    "Tasks that this process carried out, by name, and whether they raised.",
    ("task", "outcome"),
    buckets=TASK_BUCKETS,
    registry=REGISTRY,
)
ATTEMPTS = Counter(
    "uora_training_attempts_total",
    "Attempts to train a job that ended here: succeeded, failed, cancelled, interrupted (for a pause or a shutdown, or "
    "to be tried alone), lease_lost (somebody else has the job).",
    ("outcome",),
    registry=REGISTRY,
)
STEPS = Counter("uora_training_steps_total", "Optimizer steps.", ("base_model",), registry=REGISTRY)
TRAINED_TOKENS = Counter(
    "uora_trained_tokens_total", "Tokens that were learned from.", ("base_model",), registry=REGISTRY
)
RINGS = Counter(
    "uora_sweeper_rings_total",
    "Messages that the sweeper sent for rows that nobody worked on, by task.",
    ("task",),
    registry=REGISTRY,
)
DELIVERIES = Counter(
    "uora_webhook_attempts_total",
    "Attempts to deliver a webhook, by the class of the answer's status, or error.",
    ("result",),
    registry=REGISTRY,
)

# Told as 0 before the first, so that it is seen as a rise.
for _outcome in ("succeeded", "failed", "cancelled", "interrupted", "lease_lost"):
    ATTEMPTS.labels(_outcome)
for _task in (TaskName.VALIDATE, TaskName.REPORT, TaskName.TRAIN, TaskName.DELIVER):
    RINGS.labels(_task.value)
for _result in ("2xx", "3xx", "4xx", "5xx", "error"):
    DELIVERIES.labels(_result)


@contextmanager
def timed(task: str) -> Iterator[None]:
    """Count the block as one of ``task``."""
    started, outcome = perf_counter(), "raised"
    try:
        yield
        outcome = "done"
    finally:
        TASKS.labels(task, outcome).observe(perf_counter() - started)


def serve_metrics(settings: Settings) -> None:
    """Answer to ``/metrics`` from a thread, for as long as the process lives; nothing without a port.

    Raises:
        RuntimeError: the address cannot be had, say since the port is taken.
    """
    if not settings.metrics_port:
        return
    host, port = settings.metrics_host, settings.metrics_port
    app = guarded(make_wsgi_app(REGISTRY), settings)
    try:
        server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_Silent)
    except OSError as error:
        raise RuntimeError(
            f"UORA_METRICS_HOST and UORA_METRICS_PORT say {host}:{port}, which cannot be had ({error.strerror}). Each "
            "process of a machine needs a port of its own."
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def guarded(app: WSGIApplication, settings: Settings) -> WSGIApplication:
    """The app, for those who may read metrics; see `api.metrics.exposition.may_read`."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> object:
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): str(value)
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        if may_read(settings.metrics_token, client=environ.get("REMOTE_ADDR"), headers=headers):
            return app(environ, start_response)
        start_response("401 Unauthorized", [("Content-Type", "text/plain; charset=utf-8")])
        return [REFUSAL.encode()]

    return answer  # type: ignore[return-value] # an iterable of bytes in both cases


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""
