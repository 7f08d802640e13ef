"""The spans of one attempt to train a job, below the request that made the job.

The worker writes them from what its child reports: a child has no address and no secret of the collector, and nothing
to import for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from api import tracing
from worker.messages import Evaluated, Report, Started, State, Step

#: Steps are told together for so long: a training of a day is no million of spans.
STEPS_SPAN_SECONDS = 30.0


class AttemptTrace:
    """From the claim to what was recorded last.

    Args:
        parent: the job's traceparent; the attempt begins a trace of its own if it has none.
        job_id: of the job.
        attempt: the lease's.
    """

    def __init__(self, parent: str | None, *, job_id: str, attempt: int) -> None:
        self._span = tracing.begin("training.attempt", parent=parent, uora_job__id=job_id, uora_attempt=attempt)
        self._since = time.time()
        self._steps: tuple[int, int, float] | None = None  # the first, the last, and when they began

    def on_report(self, report: Report) -> None:
        """Note what the child did since its report before."""
        if not tracing.is_on():
            return
        moment = time.time()
        match report:
            case Started():
                self._record("training.start", moment, uora_steps=report.total_steps)
            case Step():
                self._on_step(report.step, moment)
            case Evaluated():
                self._end_steps()
                self._record("training.evaluation", moment, uora_step=report.step)
            case State():
                self._end_steps()
                self._record("training.state", moment, uora_step=report.step)
            case _:
                self._end_steps()
        self._since = moment

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Around the transaction that settles the attempt."""
        self._end_steps()
        with tracing.span("training.commit", parent=self._span.traceparent):
            yield

    def end(self, outcome: str) -> None:
        """The attempt is settled, or is somebody else's."""
        self._span.set(uora_outcome=outcome)
        if outcome == "failed":
            self._span.fail(outcome)
        self._span.end()

    def _on_step(self, step: int, moment: float) -> None:
        first, _, began = self._steps or (step, step, self._since)
        self._steps = (first, step, began)
        if moment - began >= STEPS_SPAN_SECONDS:
            self._end_steps(moment)

    def _end_steps(self, moment: float | None = None) -> None:
        if self._steps is None:
            return
        first, last, began = self._steps
        self._steps = None
        tracing.record(
            "training.steps",
            parent=self._span.traceparent,
            started=began,
            ended=moment or self._since,
            uora_first__step=first,
            uora_last__step=last,
        )

    def _record(self, name: str, moment: float, **attributes: int) -> None:
        tracing.record(name, parent=self._span.traceparent, started=self._since, ended=moment, **attributes)
