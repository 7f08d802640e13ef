"""How long the parts of an answer took, for metrics and traces."""

from __future__ import annotations

import time

from api import tracing
from worker.engine.metrics import EngineMetrics


class Observed:
    """The answers of one request. It is made within the request, whose trace they belong to.

    Args:
        metrics: of the engine.
        received: ``time.monotonic`` when the request came.
    """

    def __init__(self, metrics: EngineMetrics, received: float) -> None:
        self._metrics = metrics
        self._received = received
        self._traceparent = tracing.traceparent()

    def end(self, joined: float | None, first: float, *, tokens: int) -> None:
        """An answer is complete, or broke off.

        Args:
            joined: ``time.monotonic`` when it got its place in the batch; None if it never did.
            first: when its text began, or it broke off before.
            tokens: that were made for it.
        """
        self._metrics.on_completion(tokens)
        if joined is None:
            self._record("generate.queue", self._received, first)
            return
        if tokens:
            self._metrics.on_first_token(queued=joined - self._received, seconds=first - self._received)
        self._record("generate.queue", self._received, joined)
        self._record("generate.prefill", joined, first)
        self._record("generate.decode", first, time.monotonic(), uora_completion__tokens=tokens)

    def _record(self, name: str, started: float, ended: float, **attributes: int) -> None:
        if tracing.is_on():
            tracing.record(
                name,
                parent=self._traceparent,
                started=tracing.wall_clock(started),
                ended=tracing.wall_clock(ended),
                **attributes,
            )
