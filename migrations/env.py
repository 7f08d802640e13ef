"""How Alembic reaches the database. It needs its URL only, none of the services' secrets."""

from __future__ import annotations

from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection

import api.audit.models
import api.engines.models
import api.files.models
import api.idempotency.models
import api.jobs.models
import api.models.models
import api.projects.models
import api.reports.models
import api.uploads.models
import api.usage.models  # noqa: F401 - the tables of the domains above
from api.database import Base, make_engine
from api.settings import DatabaseSettings

config = context.config
#: A migration that cannot have its lock must not queue up everybody behind it.
LOCK_TIMEOUT = "5s"


def database_url() -> str:
    """The URL that the caller of Alembic set, else that of the environment."""
    return config.get_main_option("sqlalchemy.url") or DatabaseSettings().database_url


def run_offline() -> None:
    """Print the SQL."""
    context.configure(
        url=database_url(), target_metadata=Base.metadata, literal_binds=True, dialect_opts={"paramstyle": "named"}
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Migrate the database in one transaction."""
    engine = make_engine(database_url())
    try:
        with engine.connect() as connection:
            _migrate(connection)
    finally:
        engine.dispose()


def _migrate(connection: Connection) -> None:
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        # SQLite changes a table by copying and dropping it, which would cascade to the rows that refer to it.
        # The pragma does nothing inside a transaction, hence on the driver's connection.
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=sqlite,
        transactional_ddl=True,
        compare_type=True,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        context.run_migrations()


if config.config_file_name is not None and config.cmd_opts is not None:  # a caller from Python logs as it likes
    fileConfig(config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    run_offline()
else:
    run_online()
