"""What an engine counts of its answers, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.engine.runner import Served

SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class EngineMetrics:
    """Of one engine, which serves one base model. Nothing of it tells tenants or adapters apart."""

    def __init__(self, registry: CollectorRegistry, *, base_model: str) -> None:
        seconds = {"labelnames": ("base_model",), "buckets": SECONDS_BUCKETS, "registry": registry}
        self._first_token = Histogram(
            "uora_time_to_first_token_seconds",
            "From the receipt of a request to the first text of an answer.",
            **seconds,  # type: ignore[arg-type] # its own parameters
        ).labels(base_model)
        self._queue = Histogram(
            "uora_queue_seconds",
            "From the receipt of a request to a place in the batch.",
            **seconds,  # type: ignore[arg-type] # its own parameters
        ).labels(base_model)
        self._tokens = Counter(
            "uora_tokens_total",
            "Tokens of requests (prompt) and of answers (completion).",
            ("base_model", "type"),
            registry=registry,
        )
        self._prompt = self._tokens.labels(base_model, "prompt")
        self._completion = self._tokens.labels(base_model, "completion")
        self._rows = Histogram(
            "uora_batch_rows",
            "Answers of one step (text), or items of one pass (classes), that were computed together.",
            ("base_model", "work"),
            buckets=ROWS_BUCKETS,
            registry=registry,
        )
        #: Told of each step of text, and of each pass of items.
        self.on_step: Callable[[float], None] = self._rows.labels(base_model, "text").observe
        self.on_pass: Callable[[float], None] = self._rows.labels(base_model, "classes").observe

    def on_prompts(self, tokens: int) -> None:
        """A request was accepted."""
        self._prompt.inc(tokens)

    def on_first_token(self, *, queued: float, seconds: float) -> None:
        """An answer has begun.

        Args:
            queued: seconds from the request's receipt to its place in the batch.
            seconds: to the first text.
        """
        self._queue.observe(queued)
        self._first_token.observe(seconds)

    def on_completion(self, tokens: int) -> None:
        """An answer has ended; ``tokens`` were made for it."""
        self._completion.inc(tokens)


class EngineCollector(Collector):
    """What the engine holds at the moment."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def describe(self) -> Iterable[Metric]:
        """Nothing: a collector that is registered is asked then, without this."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Read it."""
        load = self._served.load()
        for name, text, value in (
            ("uora_engine_running", "Answers and items that are being computed.", load["running"]),
            ("uora_engine_waiting", "Answers and items that wait for a place.", load["waiting"]),
            ("uora_adapters_resident", "Adapters in memory.", load["resident"]),
            ("uora_adapter_bytes", "Bytes of the adapters in memory.", self._served.resident_bytes),
        ):
            family = GaugeMetricFamily(name, text, labels=["base_model"])
            family.add_metric([self._served.base.name], value)
            yield family
