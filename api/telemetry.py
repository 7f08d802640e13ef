"""Structured logs, one line an event. No keys, no contents of files or messages."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from api import tracing

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["auto", "json", "console"]

#: What these say of their work names keys, parameters of statements, headers or addresses with secrets in them, or has
#: a line for each request: whatever the level, their warnings are enough.
QUIET = (
    *("sqlalchemy", "httpx", "httpcore", "urllib3", "python_multipart", "multipart", "filelock", "asyncio"),
    *("kombu", "amqp", "redis", "opentelemetry", "wandb"),
)
#: Loggers to which their libraries have given handlers and levels of their own by the time that an app is made.
HANDLED = ("uvicorn", "uvicorn.error", "uvicorn.access", "celery", "celery.task", "celery.redirected")


def configure_logging(*, level: LogLevel = "INFO", format: LogFormat = "auto") -> None:
    """Print events to stderr, those of structlog and of the standard library's loggers alike.

    Args:
        level: the least that is printed.
        format: ``auto`` is for people on a terminal, and JSON elsewhere.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
        # Before the renderer, whose own form of exceptions for terminals shows local variables.
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = structlog.processors.JSONRenderer() if is_json(format) else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared], processors=[remove_meta, renderer]
        )
    )
    _take_over(handler, level)
    logging.captureWarnings(True)


def is_json(format: LogFormat) -> bool:
    """Whether lines are JSON here."""
    return format == "json" or (format == "auto" and not sys.stderr.isatty())


def _take_over(handler: logging.Handler, level: LogLevel) -> None:
    """Make ``handler`` the only one, but for those that belong to somebody who listens, such as a test."""
    root = logging.getLogger()
    handler.set_name("uora")
    ours_or_plain = [each for each in root.handlers if each.name == "uora" or type(each) is logging.StreamHandler]
    for each in ours_or_plain:
        root.removeHandler(each)
    root.addHandler(handler)
    root.setLevel(level)
    for name in HANDLED:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The trace that the line belongs to, where there is one."""
    if tracing.is_on() and (traceparent := tracing.traceparent()):
        event["trace_id"] = traceparent.split("-")[1]
    return event
