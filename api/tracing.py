"""Traces by OpenTelemetry, where its own variables say where they are sent to.

Without ``OTEL_EXPORTER_OTLP_ENDPOINT`` nothing of it is imported, and every function here does nothing. A trace is
carried from process to process as W3C's ``traceparent``: in a header from the api to an engine, in a job's row to
whoever works on the job, whenever that is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Tracer
    from opentelemetry.trace import Span as OtelSpan

#: OpenTelemetry's; either switches traces on.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
HEADER = "traceparent"

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value = str | int | float | bool


class Span:
    """A part of a trace. This one is none: what is done where nobody traces."""

    @property
    def traceparent(self) -> str | None:
        """Names this span to another process."""
        return None

    def set(self, **attributes: Value | None) -> None:
        """Say more. In names, ``_`` becomes a dot and ``__`` an underscore; None is left out."""

    def rename(self, name: str) -> None:
        """Call it something else."""

    def fail(self, message: str) -> None:
        """Mark it as an error."""

    def end(self) -> None:
        """It is over."""


class _Recorded(Span):
    def __init__(self, span: OtelSpan) -> None:
        self.otel = span

    @property
    def traceparent(self) -> str | None:
        return _format(self.otel)

    def set(self, **attributes: Value | None) -> None:
        self.otel.set_attributes(_attributes(attributes))

    def rename(self, name: str) -> None:
        self.otel.update_name(name)

    def fail(self, message: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self.otel.set_status(Status(StatusCode.ERROR, message))

    def end(self) -> None:
        self.otel.end()


NO_SPAN = Span()
_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def configure_tracing(process: str) -> None:
    """Send this process's spans, if OpenTelemetry's variables say where to.

    Args:
        process: ``uora-`` and this are the service's name, unless ``OTEL_SERVICE_NAME`` says another.

    Raises:
        RuntimeError: they do, and OpenTelemetry is not installed.
    """
    global _provider, _tracer
    if _tracer is not None or not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RuntimeError(
            f"{ENDPOINTS[1]} is set, but OpenTelemetry is not installed: pip install 'uora[tracing]', or unset it."
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME") or f"uora-{process}"
    _provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("uora")


def stop_tracing() -> None:
    """Send what is left. A signal may end the process before the interpreter's own end would."""
    global _provider, _tracer
    if _provider is not None:
        _provider.shutdown()
    _provider = _tracer = None


def is_on() -> bool:
    """Whether spans are recorded."""
    return _tracer is not None


def begin(name: str, *, parent: str | None = None, kind: Kind = "internal", **attributes: Value | None) -> Span:
    """A span that whoever has it must end. It is nobody's surroundings; see `span`.

    Args:
        name: low in variety; what differs goes into attributes.
        parent: the traceparent that it continues; None is the surrounding span's, or a new trace.
        kind: OpenTelemetry's.
        attributes: as `Span.set` takes them.
    """
    return _begin(name, context=_context(parent), kind=kind, attributes=attributes)


@contextmanager
def span(
    name: str, *, parent: str | None = None, kind: Kind = "internal", **attributes: Value | None
) -> Iterator[Span]:
    """A span around the block; an exception marks it. Arguments are those of `begin`."""
    with _around(begin(name, parent=parent, kind=kind, **attributes)) as entered:
        yield entered


@contextmanager
def server_span(method: str, *, parent: str | None, trusted: bool) -> Iterator[Span]:
    """A span around a request that came in.

    Args:
        method: HTTP's.
        parent: the traceparent that it brought.
        trusted: whether its trace goes on; else a new one begins, which only names the other: clients must not decide
            what is recorded here, or where it belongs.
    """
    links: list[Link] = []
    if _tracer is not None and parent is not None and not trusted:
        from opentelemetry import trace

        links = [trace.Link(trace.get_current_span(_context(parent)).get_span_context())]
    started = _begin(
        method,
        context=_context(parent if trusted else None),
        kind="server",
        attributes={"http_request_method": method},
        links=links,
    )
    with _around(started) as entered:
        yield entered


def record(name: str, *, parent: str | None, started: float, ended: float, **attributes: Value | None) -> None:
    """A span that is over already.

    Args:
        name: as in `begin`.
        parent: the traceparent that it continues.
        started: ``time.time()`` then.
        ended: the same.
        attributes: as `Span.set` takes them.
    """
    if _tracer is None:
        return
    found = _tracer.start_span(
        name, context=_context(parent), attributes=_attributes(attributes), start_time=int(started * 1e9)
    )
    found.end(int(ended * 1e9))


def traceparent() -> str | None:
    """Names the surrounding span to another process; None without any."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    return _format(trace.get_current_span())


def headers() -> dict[str, str]:
    """What a request to another of our processes takes along."""
    found = traceparent()
    return {} if found is None else {HEADER: found}


def wall_clock(monotonic: float) -> float:
    """``time.time()`` as it was at a moment of ``time.monotonic()``."""
    return time.time() - (time.monotonic() - monotonic)


def _begin(
    name: str, *, context: Context | None, kind: Kind, attributes: Mapping[str, Value | None], links: Any = ()
) -> Span:
    if _tracer is None:
        return NO_SPAN
    from opentelemetry.trace import SpanKind

    found = _tracer.start_span(
        name, context=context, kind=SpanKind[kind.upper()], attributes=_attributes(attributes), links=links
    )
    return _Recorded(found)


@contextmanager
def _around(entered: Span) -> Iterator[Span]:
    if not isinstance(entered, _Recorded):
        yield entered
        return
    from opentelemetry import trace

    # Without the exception's text, which may quote what a user sent; the log has it.
    with trace.use_span(entered.otel, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield entered
        except Exception as error:
            entered.fail(type(error).__name__)
            raise


def _context(parent: str | None) -> Context | None:
    """None is the surrounding one."""
    if _tracer is None or parent is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: parent}, context=Context())


def _format(span: OtelSpan) -> str | None:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context=set_span_in_context(span))
    return carrier.get(HEADER)


def _attributes(found: Mapping[str, Value | None]) -> dict[str, Value]:
    return {_dotted(name): value for name, value in found.items() if value is not None}


def _dotted(name: str) -> str:
    return "_".join(part.replace("_", ".") for part in name.split("__"))
