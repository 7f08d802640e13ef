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

from api.database import Base, make_engine
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


def test_every_foreign_key_has_an_index_and_every_list_an_order(empty_url: str) -> None:
    command.upgrade(alembic_config(empty_url), "head")
    engine = make_engine(empty_url)
    inspector = inspect(engine)
    for table in Base.metadata.tables:
        indexed = {tuple(index["column_names"]) for index in inspector.get_indexes(table)}
        for key in inspector.get_foreign_keys(table):
            assert tuple(key["constrained_columns"]) in indexed, table
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
