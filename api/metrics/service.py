"""What the database knows, read when somebody asks: every api process tells the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session, sessionmaker

from api.database import database_now
from api.jobs.models import ENDED, JobStatus
from api.metrics import repository

log = structlog.get_logger(__name__)

#: How old an answer may be: several Prometheus servers, and people, cost no more than one.
KEPT_SECONDS = 1.0
#: The same for jobs that have ended, of which there are more each day: counting a million takes half a second.
ENDED_KEPT_SECONDS = 60.0
#: States that somebody waits to be taken from.
WAITING = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED)
UNFINISHED = frozenset(JobStatus) - ENDED


class DatabaseCollector(Collector):
    """Jobs, engines and webhooks of the whole installation.

    Without the database there is ``uora_database_up 0`` instead; the process's own metrics are there all the same.

    Args:
        sessions: only read.
        base_models: those of the settings, which are told also where no engine serves them.
        engine_ttl: an engine without a heartbeat for this long is dead.
    """

    def __init__(self, sessions: sessionmaker[Session], *, base_models: Iterable[str], engine_ttl: timedelta) -> None:
        self._sessions = sessions
        self._base_models = tuple(base_models)
        self._engine_ttl = engine_ttl
        self._reading = threading.Lock()
        self._kept: list[Metric] = []
        self._read_at = float("-inf")
        self._ended: dict[JobStatus, int] = {}
        self._ended_read_at = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families, a second old at most."""
        with self._reading:
            if time.monotonic() - self._read_at > KEPT_SECONDS:
                self._kept = self._read()
                self._read_at = time.monotonic()
            return self._kept

    def _read(self) -> list[Metric]:
        up = GaugeMetricFamily("uora_database_up", "Whether the database answered.")
        try:
            with self._sessions() as session:
                found = [*self._jobs(session), *self._engines(session), *self._webhooks(session)]
        except Exception:
            log.exception("metrics_not_read")
            found = []
        up.add_metric((), float(bool(found)))
        return [up, *found]

    def _jobs(self, session: Session) -> Iterator[Metric]:
        moment = database_now(session)
        jobs = GaugeMetricFamily("uora_jobs", "Jobs by status; queued ones wait for a trainer.", labels=["status"])
        counts = repository.count_jobs(session, UNFINISHED) | self._count_ended(session)
        for status in JobStatus:
            jobs.add_metric([status.value], counts[status])
        age = GaugeMetricFamily(
            "uora_oldest_job_age_seconds",
            "Since the creation of the oldest job that waits in the status; 0 without any.",
            labels=["status"],
        )
        for status in WAITING:
            created_at = repository.oldest_job(session, status)
            seconds = (moment - created_at).total_seconds() if created_at else 0.0
            age.add_metric([status.value], max(0.0, seconds))
        abandoned = GaugeMetricFamily(
            "uora_jobs_abandoned", "Running jobs whose lease has run out: their trainer is lost."
        )
        abandoned.add_metric((), repository.count_abandoned(session, moment))
        yield from (jobs, age, abandoned)

    def _count_ended(self, session: Session) -> dict[JobStatus, int]:
        if time.monotonic() - self._ended_read_at > ENDED_KEPT_SECONDS:
            self._ended = repository.count_jobs(session, ENDED)
            self._ended_read_at = time.monotonic()
        return self._ended

    def _engines(self, session: Session) -> Iterator[Metric]:
        engines = GaugeMetricFamily("uora_engines", "Live engines by base model.", labels=["base_model"])
        counts = repository.count_engines(session, database_now(session), ttl=self._engine_ttl)
        for base_model in dict.fromkeys((*self._base_models, *counts)):
            engines.add_metric([base_model], counts.get(base_model, 0))
        yield engines

    def _webhooks(self, session: Session) -> Iterator[Metric]:
        count, first = repository.pending_deliveries(session)
        pending = GaugeMetricFamily("uora_webhooks_pending", "Webhooks that are not delivered yet.")
        pending.add_metric((), count)
        late = GaugeMetricFamily(
            "uora_webhooks_overdue_seconds", "Since the first pending webhook was due; 0 if none is."
        )
        overdue = (database_now(session) - first).total_seconds() if first else 0.0
        late.add_metric((), max(0.0, overdue))
        yield from (pending, late)
