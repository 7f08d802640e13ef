"""Watches one training child: renews the lease while it runs, passes on what it reports, stops it when told."""

from __future__ import annotations

import logging
import queue
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import TypeVar

from sqlalchemy.exc import OperationalError

from worker import failures
from worker.child_process import ChildProcess
from worker.context import Resources
from worker.failures import Failure
from worker.lease import Lease, LeaseLost, renew
from worker.messages import ChildRequest, Done, Evaluated, Failed, Report, Started, Step
from worker.progress import JobProgress, read_artifact
from worker.results import Finished

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How soon a shutdown is noticed while the child reports nothing.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class CancelRequested:
    """The user cancelled; the child is gone."""


@dataclass(frozen=True)
class ShuttingDown:
    """This worker was told to leave; the child is gone."""


@dataclass(frozen=True)
class TakenOver:
    """Somebody else has the job; the child is gone and nothing may be written."""


Outcome = Finished | Failure | CancelRequested | ShuttingDown | TakenOver


def supervise(resources: Resources, lease: Lease, request: ChildRequest) -> Outcome:
    """Run one training to its end, whatever that is. The child is gone when this returns or raises."""
    with ChildProcess.running(request, grace=resources.settings.stop_grace) as child:
        try:
            return _Watch(resources, lease, request, child).until_end()
        except LeaseLost as lost:
            logger.warning("%s", lost)
            return TakenOver()


def patiently(write: Callable[[], T], *, patience: timedelta) -> T:
    """Repeat a transaction while the database does not answer: its restart must not cost a training.

    Raises:
        OperationalError: it did not answer for as long as ``patience``.
    """
    deadline = monotonic() + patience.total_seconds()
    while True:
        try:
            return write()
        except OperationalError as error:
            if monotonic() >= deadline:
                raise
            logger.warning("the database does not answer, trying again: %s", error)
            sleep(_POLL_SECONDS)


class _Watch:
    """The loop of `supervise` and what it remembers."""

    def __init__(self, resources: Resources, lease: Lease, request: ChildRequest, child: ChildProcess) -> None:
        self._resources = resources
        self._lease = lease
        self._request = request
        self._child = child
        self._progress = JobProgress(resources.sessions, lease)
        self._next_beat = monotonic()

    def until_end(self) -> Outcome:
        while True:
            if self._resources.stopping.is_set():
                return ShuttingDown()
            if monotonic() >= self._next_beat and self._beat():
                return CancelRequested()
            try:
                report = self._child.next_report(within_seconds=_POLL_SECONDS)
            except queue.Empty:
                continue
            outcome = self._ended() if report is None else self._record(report)
            if outcome is not None:
                return outcome

    def _beat(self) -> bool:
        """Renew the lease; answers whether the job is to be cancelled."""
        settings = self._resources.settings
        renewal = self._patiently(lambda: renew(self._resources.sessions, self._lease, ttl=settings.lease_ttl))
        if not renewal.ours:
            raise LeaseLost(f"job {self._lease.job_id}: attempt {self._lease.attempt} was taken over")
        self._next_beat = monotonic() + settings.heartbeat_interval.total_seconds()
        return renewal.cancel_requested

    def _record(self, report: Report) -> Outcome | None:
        match report:
            case Started():
                self._patiently(lambda: self._progress.on_start(report.total_steps))
            case Step():
                self._patiently(lambda: self._progress.on_step(report))
            case Evaluated():
                artifact = read_artifact(self._request.work_dir, report.file)
                self._patiently(lambda: self._progress.on_evaluation(report, artifact))
            case Done():
                return Finished(done=report, artifact=read_artifact(self._request.work_dir, report.file))
            case Failed():
                self._child.log_stderr(self._lease, level=_log_level(report.failure))
                return report.failure
        return None

    def _ended(self) -> Failure:
        """The child is gone without a result."""
        status = self._child.wait(self._resources.settings.stop_grace)
        self._child.log_stderr(self._lease, level=logging.ERROR)
        logger.error("job %s: the training process ended with status %s", self._lease.job_id, status)
        return failures.KILLED if status == -signal.SIGKILL else failures.INTERNAL

    def _patiently(self, write: Callable[[], T]) -> T:
        return patiently(write, patience=self._resources.settings.lease_ttl)


def _log_level(failure: Failure) -> int:
    return logging.ERROR if failure.kind is failures.FailureKind.PLATFORM else logging.INFO
