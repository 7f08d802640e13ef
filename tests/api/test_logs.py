"""Log lines: one form for all loggers, and nothing in them that is a secret or a user's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from structlog.contextvars import bound_contextvars

from api.database import make_engine
from api.telemetry import configure_logging


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Takes what was logged since the last time; loggers are what they were before in the end."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = structlog.get_config()
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**before)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_all_loggers_write_the_same_lines(stderr: Callable[[], str]) -> None:
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.addHandler(logging.StreamHandler())
    uvicorn.propagate = False
    logging.getLogger("uvicorn.error").setLevel("ERROR")
    configure_logging(format="auto")
    with bound_contextvars(request_id="req_1", job_id="ftjob-1"):
        structlog.get_logger().info("ours", number=1)
        for name in ("uvicorn.error", "celery.worker", "sqlalchemy.pool", "worker.supervisor"):
            logging.getLogger(name).warning("theirs %d", 2)
    found = lines(stderr())
    assert [line["event"] for line in found] == ["ours", *["theirs 2"] * 4]
    assert all((line["request_id"], line["job_id"]) == ("req_1", "ftjob-1") for line in found)
    assert all({"level", "timestamp"} <= line.keys() for line in found)
    assert [line.get("logger") for line in found][1:] == [
        "uvicorn.error",
        "celery.worker",
        "sqlalchemy.pool",
        "worker.supervisor",
    ]


def test_an_exception_is_one_line(stderr: Callable[[], str]) -> None:
    configure_logging(format="json")
    secret = "local-variable"
    try:
        raise ValueError(len(secret))
    except ValueError:
        structlog.get_logger().exception("ours")
        logging.getLogger("celery").exception("theirs")
    found = lines(stderr())
    assert ["ValueError: 14" in line["exception"] for line in found] == [True, True]
    assert not any("local-variable" in line["exception"] for line in found)


def test_the_level_holds_for_all(stderr: Callable[[], str]) -> None:
    logging.getLogger("uvicorn.error").setLevel("INFO")
    configure_logging(level="WARNING", format="json")
    structlog.get_logger().info("ours")
    for name in ("worker", "uvicorn.error"):
        logging.getLogger(name).info("theirs")
    structlog.get_logger().warning("told")
    assert [line["event"] for line in lines(stderr())] == ["told"]


def test_people_on_a_terminal_read_no_json(stderr: Callable[[], str]) -> None:
    configure_logging(format="console")
    structlog.get_logger().info("ours", number=1)
    logging.getLogger("celery").info("theirs")
    printed = stderr().splitlines()
    assert len(printed) == 2
    assert not any(line.startswith("{") for line in printed)


def test_statements_show_no_values_whatever_the_level(stderr: Callable[[], str]) -> None:
    configure_logging(level="DEBUG", format="json")
    engine = make_engine("sqlite://")
    with engine.connect() as connection:
        connection.execute(text("SELECT :value"), {"value": "whsec_secret"})
        with pytest.raises(DBAPIError) as raised:
            connection.execute(text("SELECT nothing FROM nowhere WHERE x = :value"), {"value": "whsec_secret"})
    assert "nowhere" in str(raised.value)
    assert "whsec_secret" not in str(raised.value) + stderr()
