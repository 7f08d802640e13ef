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

from worker import failures, memory
from worker.child_process import ChildProcess
from worker.context import Resources
from worker.failures import Failure
from worker.lease import Lease, LeaseLost, Renewal, renew
from worker.messages import ChildRequest, Done, Evaluated, Failed, Report, Started, State, Step, Stopped
from worker.progress import JobProgress, read_stored, remove_stored
from worker.results import Finished

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How soon a shutdown is noticed while the child reports nothing.
_POLL_SECONDS = 0.2
#: How a child ends that SIGTERM reached before its first step; a service manager sends it to all processes at once.
_TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class CancelRequested:
    """The user cancelled; the child is gone."""


@dataclass(frozen=True)
class Interrupted:
    """The child stopped before its end, for a pause or because this worker leaves; what it kept is stored."""


@dataclass(frozen=True)
class TakenOver:
    """Somebody else has the job; the child is gone and nothing may be written."""


Outcome = Finished | Failure | CancelRequested | Interrupted | TakenOver


def supervise(resources: Resources, lease: Lease, request: ChildRequest) -> Outcome:
    """Run one training to its end, whatever that is. The child is gone when this returns or raises."""
    child = resources.spare.take()
    with child.running(request, grace=resources.settings.stop_grace):
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
        #: When a child that was asked to stop is not waited for any longer.
        self._stop_by: float | None = None

    def until_end(self) -> Outcome:
        while True:
            renewal = self._beat() if monotonic() >= self._next_beat else None
            if renewal is not None and renewal.cancel_requested:
                return CancelRequested()
            if self._resources.stopping.is_set() or (renewal is not None and renewal.pause_requested):
                self._ask_to_stop()
            if self._stop_by is not None and monotonic() >= self._stop_by:
                return Interrupted()
            self._child.sample_memory()
            try:
                report = self._child.next_report(within_seconds=_POLL_SECONDS)
            except queue.Empty:
                continue
            outcome = self._ended() if report is None else self._record(report)
            if outcome is not None:
                return outcome

    def _beat(self) -> Renewal:
        """Renew the lease, and learn whether the job is to stop.

        Raises:
            LeaseLost: somebody else has it.
        """
        settings = self._resources.settings
        renewal = self._patiently(lambda: renew(self._resources.sessions, self._lease, ttl=settings.lease_ttl))
        if not renewal.ours:
            raise LeaseLost(f"job {self._lease.job_id}: attempt {self._lease.attempt} was taken over")
        self._next_beat = monotonic() + settings.heartbeat_interval.total_seconds()
        return renewal

    def _ask_to_stop(self) -> None:
        """Ask once; the child ends its step and reports its state."""
        if self._stop_by is None:
            self._stop_by = monotonic() + self._resources.settings.pause_grace.total_seconds()
            self._child.ask_to_stop()

    def _record(self, report: Report) -> Outcome | None:
        match report:
            case Started():
                self._patiently(lambda: self._progress.on_start(report.total_steps))
            case Step():
                self._patiently(lambda: self._progress.on_step(report))
            case Evaluated():
                artifact = read_stored(self._request.work_dir, report.file)
                self._patiently(lambda: self._progress.on_evaluation(report, artifact))
            case State():
                state = read_stored(self._request.work_dir, report.file)
                self._patiently(lambda: self._progress.on_state(report, state))
                remove_stored(self._request.work_dir, report.file)
            case Stopped():
                return Interrupted()
            case Done():
                return Finished(done=report, artifact=read_stored(self._request.work_dir, report.file))
            case Failed():
                self._child.log_stderr(self._lease, level=_log_level(report.failure))
                return report.failure
        return None

    def _ended(self) -> Outcome:
        """The child is gone without a result."""
        status = self._child.wait(self._resources.settings.stop_grace)
        if self._stop_by is not None or status in _TERMINATED:
            return Interrupted()
        self._child.log_stderr(self._lease, level=logging.ERROR)
        logger.error("job %s: the training process ended with status %s", self._lease.job_id, status)
        if status != -signal.SIGKILL:
            return failures.INTERNAL
        return failures.killed(peak_bytes=self._child.peak_bytes, total_bytes=memory.total_bytes())

    def _patiently(self, write: Callable[[], T]) -> T:
        return patiently(write, patience=self._resources.settings.lease_ttl)


def _log_level(failure: Failure) -> int:
    return logging.ERROR if failure.kind is failures.FailureKind.PLATFORM else logging.INFO
