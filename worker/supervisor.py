"""Watches one training child: renews its runs' leases, passes on what they report, stops them when told.

Each run has its own lease and comes to its own end; the child is there for as long as one of them goes on.
"""

from __future__ import annotations

import logging
import queue
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

from sqlalchemy.exc import OperationalError
from structlog.contextvars import bound_contextvars

from worker import failures, memory, metrics
from worker.child_process import ChildProcess
from worker.context import Resources
from worker.failures import Failure
from worker.following import Followers
from worker.lease import Lease, LeaseLost, Renewal, renew
from worker.messages import ChildRequest, Done, Evaluated, Failed, Report, Started, State, Step, Stop, Stopped
from worker.progress import JobProgress, Trained, read_stored, remove_stored
from worker.results import Finished

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How soon a shutdown is noticed while the child reports nothing.
_POLL_SECONDS = 0.2
#: How a child ends that SIGTERM reached before its first step; a service manager sends it to all processes at once.
_TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class CancelRequested:
    """The user cancelled; the child was told to stop."""


@dataclass(frozen=True)
class Interrupted:
    """The run stopped before its end: for a pause, because this worker leaves, or by what may be another's doing."""

    #: Whether it goes on by itself: of several runs of a process, nobody can say which one brought it down.
    alone: bool = False


@dataclass(frozen=True)
class TakenOver:
    """Somebody else has the job; the child was told to stop and nothing may be written."""


Outcome = Finished | Failure | CancelRequested | Interrupted | TakenOver
#: Writes down how an attempt ended, and what its run has come to.
Settle = Callable[[Lease, Outcome, Trained], None]


def supervise(resources: Resources, leases: Sequence[Lease], request: ChildRequest, settle: Settle) -> None:
    """Run trainings to their ends, whatever those are. The child is gone when this returns or raises.

    Args:
        resources: of this worker.
        leases: of the jobs of ``request.runs``, in the same order.
        request: for the child.
        settle: told of each end at once; of the last when the child is gone.
    """
    child = resources.spare.take()
    with child.running(request, grace=resources.settings.stop_grace):
        watch = _Watch(resources, leases, request, child, settle)
        try:
            watch.until_end()
        finally:
            watch.let_followers_go()


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


@dataclass
class _Watched:
    """A run that has not ended."""

    lease: Lease
    work_dir: Path
    progress: JobProgress
    #: Nobody before the first step.
    followers: Followers = field(default_factory=Followers)
    #: When it was asked to stop: until when it is waited for.
    stop_by: float | None = None

    def __str__(self) -> str:
        return f"job {self.lease.job_id}"


class _Watch:
    """The loop of `supervise` and what it remembers."""

    def __init__(
        self,
        resources: Resources,
        leases: Sequence[Lease],
        request: ChildRequest,
        child: ChildProcess,
        settle: Settle,
    ) -> None:
        self._resources = resources
        self._child = child
        self._settle = settle
        self._base_model = request.base_model
        self._shared = len(request.runs) > 1
        #: By the number that reports name.
        self._running = {
            number: _Watched(lease, run.work_dir, JobProgress(resources.sessions, lease))
            for number, (lease, run) in enumerate(zip(leases, request.runs, strict=True))
        }
        self._next_beat = monotonic()

    def until_end(self) -> None:
        while self._running:
            if monotonic() >= self._next_beat:
                self._beat()
            self._stop_in_time()
            self._child.sample_memory()
            self._listen()

    def let_followers_go(self) -> None:
        """Those of runs that came to no end here."""
        for run in self._running.values():
            run.followers.close(failed=False)

    def _listen(self) -> None:
        try:
            report = self._child.next_report(within_seconds=_POLL_SECONDS)
        except queue.Empty:
            return
        if report is None:
            self._end_with_child()
        else:
            self._take(report)

    def _beat(self) -> None:
        """Renew the leases, and learn which jobs are to stop."""
        settings = self._resources.settings
        for number, run in tuple(self._running.items()):
            renewal = self._patiently(partial(renew, self._resources.sessions, run.lease, ttl=settings.lease_ttl))
            with bound_contextvars(job_id=run.lease.job_id):
                self._obey(number, renewal)
        self._next_beat = monotonic() + settings.heartbeat_interval.total_seconds()

    def _obey(self, number: int, renewal: Renewal) -> None:
        if not renewal.ours:
            logger.warning("%s was taken over", self._running[number])
            self._end(number, TakenOver())
        elif renewal.cancel_requested:
            self._end(number, CancelRequested())
        elif renewal.pause_requested:
            self._ask_to_stop(number)

    def _stop_in_time(self) -> None:
        """Stop all when this worker leaves, and wait for none longer than it may take."""
        for number, run in tuple(self._running.items()):
            if self._resources.stopping.is_set():
                self._ask_to_stop(number)
            if run.stop_by is not None and monotonic() >= run.stop_by:
                self._end(number, Interrupted())

    def _ask_to_stop(self, number: int) -> None:
        """Ask once; the run ends its step and reports its state."""
        run = self._running[number]
        if run.stop_by is not None:
            return
        run.stop_by = monotonic() + self._resources.settings.pause_grace.total_seconds()
        if all(each.stop_by is not None for each in self._running.values()):
            self._child.ask_to_stop()  # which also ends it where it has not come to a first step
        else:
            self._child.send(Stop(stop=number))

    def _take(self, report: Report) -> None:
        run = self._running.get(report.run)
        if run is None:
            return  # it was told to stop, and what it did until then is nobody's
        with bound_contextvars(job_id=run.lease.job_id):
            self._act_on(run, report)

    def _act_on(self, run: _Watched, report: Report) -> None:
        run.lease.trace.on_report(report)
        try:
            outcome = self._record(run, report)
        except LeaseLost as lost:
            logger.warning("%s", lost)
            outcome = TakenOver()
        except OperationalError:
            raise
        except Exception as error:
            logger.exception("%s: what it reported cannot be recorded", run)
            outcome = failures.describe(error)
        if outcome is not None:
            self._end(report.run, outcome)

    def _record(self, run: _Watched, report: Report) -> Outcome | None:
        match report:
            case Started():
                job = self._patiently(lambda: run.progress.on_start(report.total_steps))
                held = self._resources
                run.followers = Followers.of(job, run.lease, held.sessions, held.settings)
            case Step():
                metrics.STEPS.labels(self._base_model).inc()
                self._patiently(lambda: run.progress.on_step(report))
                run.followers.log(report.step, report.model_dump())
            case Evaluated():
                artifact = read_stored(run.work_dir, report.file)
                self._patiently(lambda: run.progress.on_evaluation(report, artifact))
                run.followers.log(report.step, report.metrics)
            case State():
                state = read_stored(run.work_dir, report.file)
                self._patiently(lambda: run.progress.on_state(report, state))
                remove_stored(run.work_dir, report.file)
            case Stopped():
                return Interrupted()
            case Done():
                metrics.TRAINED_TOKENS.labels(self._base_model).inc(report.trained_tokens)
                return Finished(done=report, artifact=read_stored(run.work_dir, report.file))
            case Failed():
                self._child.log_stderr(str(run), level=_log_level(report.failure))
                if self._shared and failures.may_be_anothers(report.failure):
                    return Interrupted(alone=True)
                return report.failure
        return None

    def _end_with_child(self) -> None:
        """The child is gone before these runs' ends."""
        status = self._child.wait(self._resources.settings.stop_grace)
        if status not in _TERMINATED and any(run.stop_by is None for run in self._running.values()):
            jobs = ", ".join(str(run) for run in self._running.values())
            with bound_contextvars(job_id=", ".join(run.lease.job_id for run in self._running.values())):
                self._child.log_stderr(jobs, level=logging.ERROR)
                logger.error("%s: the training process ended with status %s", jobs, status)
        for number, run in tuple(self._running.items()):
            self._end(number, self._ended_with_child(run, status))

    def _ended_with_child(self, run: _Watched, status: int | None) -> Outcome:
        if run.stop_by is not None or status in _TERMINATED:
            return Interrupted()
        if self._shared:
            return Interrupted(alone=True)
        if status != -signal.SIGKILL:
            return failures.INTERNAL
        return failures.killed(peak_bytes=self._child.peak_bytes, total_bytes=memory.total_bytes())

    def _end(self, number: int, outcome: Outcome) -> None:
        run = self._running.pop(number)
        run.followers.close(failed=isinstance(outcome, Failure))
        if self._running:
            self._child.send(Stop(stop=number))  # unless it has ended by itself
        else:
            self._child.stop(self._resources.settings.stop_grace)
        self._settle(run.lease, outcome, run.progress.trained)

    def _patiently(self, write: Callable[[], T]) -> T:
        return patiently(write, patience=self._resources.settings.lease_ttl)


def _log_level(failure: Failure) -> int:
    return logging.ERROR if failure.kind is failures.FailureKind.PLATFORM else logging.INFO
