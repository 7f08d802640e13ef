"""The commands of docs/operations.md that save what is stored and restore it, as they stand."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from api.database import make_engine
from tests.api.rows import add_job
from tests.api.support import POSTGRES, ROOT, empty_database, make_tenant, migrate

PAGE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)


def block_with(command: str) -> str:
    """The page's only one."""
    (found,) = [block for block in BLOCKS if command in block]
    return found


def run(script: str, folder: Path, **environment: str) -> None:
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-ec", script],
        cwd=folder,
        env={"PATH": commands} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def fill(url: str) -> str:
    """A database with a job; its id."""
    migrate(url)
    database = make_engine(url)
    with Session(database) as session, session.begin():
        job_id = add_job(session, make_tenant(session, "Acme")).id
    database.dispose()
    return job_id


def jobs_of(url: str) -> list[str]:
    database = create_engine(url)
    with database.connect() as connection:
        found = [row.id for row in connection.execute(text("SELECT id FROM jobs"))]
    database.dispose()
    return found


@pytest.mark.postgres
def test_what_was_saved_is_restored(tmp_path: Path) -> None:
    files = tmp_path / "data" / "files"
    files.mkdir(parents=True)
    (files / "file-1").write_text("rows")
    (tmp_path / "backup").mkdir()
    for name in ("alembic.ini", "migrations"):  # where the last command is run
        (tmp_path / name).symlink_to(ROOT / name)
    host, _, port = POSTGRES.partition(":")
    with empty_database("postgresql", tmp_path) as url:
        job_id = fill(url)
        here = {"POSTGRES_URL": url.replace("+psycopg", "")}
        run(block_with("pg_dump").replace("/data/files", str(files)), tmp_path, **here)

    (files / "file-1").unlink()
    name = f"uora_test_{secrets.token_hex(6)}"
    restored = f"postgresql+psycopg://postgres@{POSTGRES}/{name}"
    script = block_with("pg_restore").replace("/data/files", str(files)).replace("createdb uora", f"createdb {name}")
    try:
        run(
            script,
            tmp_path,
            POSTGRES_URL=restored.replace("+psycopg", ""),
            UORA_DATABASE_URL=restored,
            UORA_ENGINE_TOKEN="none",
            PGHOST=host,
            PGPORT=port or "5432",
            PGUSER="postgres",
        )
        assert jobs_of(restored) == [job_id]
    finally:
        with psycopg.connect(f"postgresql://postgres@{POSTGRES}/postgres", autocommit=True) as admin:
            admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    assert (files / "file-1").read_text() == "rows"


def test_sqlite_is_saved_while_it_is_open(tmp_path: Path) -> None:
    (tmp_path / ".uora").mkdir()
    url = f"sqlite:///{tmp_path / '.uora' / 'uora.db'}"
    job_id = fill(url)
    writer = create_engine(url)
    with writer.connect() as open_connection:
        open_connection.execute(text("SELECT count(*) FROM jobs"))
        run(block_with("sqlite3"), tmp_path)
    writer.dispose()
    assert jobs_of(f"sqlite:///{tmp_path / 'backup.db'}") == [job_id]
