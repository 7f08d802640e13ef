"""Migrations from empty to head and back, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import inspect
from sqlalchemy.orm import Session

from api.database import Base, make_engine
from api.jobs.models import Job, JobEvent, JobStatus
from api.models.models import Adapter
from tests.api.support import ROOT, alembic_config, empty_database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database in a folder that is not there yet."""
    with empty_database(request.param, tmp_path) as url:
        yield url


def table_names(url: str) -> set[str]:
    engine = make_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_up_down_and_up_again(empty_url: str) -> None:
    config = alembic_config(empty_url)
    for _ in range(2):
        command.upgrade(config, "head")
        assert table_names(empty_url) == {"alembic_version", *Base.metadata.tables}
        command.downgrade(config, "base")
        assert table_names(empty_url) == {"alembic_version"}


def test_the_models_are_what_the_migrations_make(empty_url: str) -> None:
    config = alembic_config(empty_url)
    command.upgrade(config, "head")
    command.check(config)


OLD_ROWS = (
    "INSERT INTO projects (id, created_at, name, slug) VALUES ('p', '2026-11-22 10:00:00', 'Acme', 'acme')",
    "INSERT INTO jobs (id, created_at, project_id, status, model, training_file, seed, hyperparameters, adapter, "
    "cancel_requested, attempt, lost_trainers) VALUES ('j', '2026-11-22 10:00:00', 'p', 'queued', 'tiny', 'f', 1, "
    "'{}', '{}', false, 0, 0)",
    "INSERT INTO job_events (id, created_at, job_id, level, type, message) VALUES "
    "('e', '2026-11-22 10:00:00', 'j', 'info', 'message', 'Created')",
)


def test_jobs_of_the_release_before_go_on(empty_url: str) -> None:
    config = alembic_config(empty_url)
    command.upgrade(config, "0001")
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        for statement in OLD_ROWS:
            connection.exec_driver_sql(statement)
    command.upgrade(config, "head")
    with Session(engine) as session, session.begin():
        job = session.query(Job).one()
        assert (job.model, job.base_model, job.task, job.warm_start) == ("tiny", "tiny", "chat", None)
        assert (job.options, job.result_files, job.pause_requested) == ({}, [], False)
        assert session.query(JobEvent).count() == 1
        job.status, job.model = JobStatus.PAUSED, "ft:tiny:acme::12345678"
    command.downgrade(config, "0001")
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT status, model FROM jobs").one() == ("cancelled", "tiny")
        assert connection.exec_driver_sql("SELECT count(*) FROM job_events").scalar_one() == 1
    engine.dispose()


CHANGES = (
    "INSERT INTO adapters (id, created_at, project_id, base_model, task, digest, manifest, artifact) "
    "VALUES ('a', '2026-11-22 10:00:00', 'p', 'tiny', 'chat', 'd', '{}', '')",
    "UPDATE adapters SET digest = 'e'",
    "DELETE FROM projects",
)


def test_every_change_of_adapters_gives_another_version(empty_url: str) -> None:
    """Whatever later migrations make of the table: its triggers go with a copy's original on SQLite."""
    command.upgrade(alembic_config(empty_url), "head")
    engine = make_engine(empty_url)
    seen: list[tuple[str, int]] = []
    with engine.begin() as connection:
        connection.exec_driver_sql(OLD_ROWS[0])
    for statement in CHANGES:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
        with engine.begin() as connection:
            seen += map(tuple, connection.exec_driver_sql("SELECT base_model, version FROM adapter_versions"))
    engine.dispose()
    assert [base_model for base_model, _ in seen] == ["tiny"] * len(CHANGES)
    assert len(set(seen)) == len(CHANGES)


def test_adapters_of_the_release_before_have_their_task(empty_url: str) -> None:
    config = alembic_config(empty_url)
    command.upgrade(config, "0005")
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(OLD_ROWS[0])
        connection.exec_driver_sql(
            "INSERT INTO adapters (id, created_at, project_id, base_model, digest, manifest, artifact) VALUES "
            """('a', '2026-11-22 10:00:00', 'p', 'tiny', 'd', '{"task": "regression"}', ''), """
            "('b', '2026-11-22 10:00:00', 'p', 'tiny', 'd', '{}', '')"
        )
    command.upgrade(config, "head")
    with Session(engine) as session:
        assert {adapter.id: adapter.task for adapter in session.query(Adapter)} == {"a": "regression", "b": "chat"}
    engine.dispose()


def test_every_foreign_key_has_an_index_and_every_list_an_order(empty_url: str) -> None:
    command.upgrade(alembic_config(empty_url), "head")
    engine = make_engine(empty_url)
    inspector = inspect(engine)
    for table in Base.metadata.tables:
        indexed = {index["column_names"][0] for index in inspector.get_indexes(table)}
        for key in inspector.get_foreign_keys(table):
            assert key["constrained_columns"][0] in indexed, table
        assert inspector.get_pk_constraint(table)["constrained_columns"] == ["seq"]
    engine.dispose()


def test_the_command_needs_no_secret(tmp_path: Path) -> None:
    """Only UORA_HOME is set, and the folder is not there."""
    home = tmp_path / "not" / "there"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UORA_")}
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head"],
        cwd=tmp_path,
        env={**environment, "UORA_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert table_names(f"sqlite:///{home / 'uora.db'}") == {"alembic_version", *Base.metadata.tables}
