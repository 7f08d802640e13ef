"""Engine, session and the ORM base. Sync on purpose (see docs/decisions)."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Integer,
    MetaData,
    TypeDecorator,
    create_engine,
    event,
    func,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

#: Python's None is SQL's NULL, not JSON's null, so that ``IS NULL`` finds it.
JsonColumn = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
#: Execution option of connections that will not write.
READ_ONLY = "uora_read_only"
#: Sequence numbers: SQLite counts up by itself only in an INTEGER primary key.
Sequence = BigInteger().with_variant(Integer(), "sqlite")

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_LETTERS = 24
#: Connections that a process has at most. All are kept: PostgreSQL takes milliseconds to open one.
MAX_CONNECTIONS = 15


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC times on both databases; SQLite stores them naive."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times: they would mean another moment on each database."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"expected an aware datetime, found {value!r}")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give back an aware time."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Base(DeclarativeBase):
    """ORM base. Listable rows have ``seq``, the cursor's order, and ``id``, the public name."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JsonColumn, datetime: UtcDateTime()}  # noqa: RUF012


class Listed:
    """Columns of a row that clients page through, newest first."""

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(default=lambda: now())


def now() -> datetime:
    """The present, aware, UTC."""
    return datetime.now(UTC)


def database_now(session: Session) -> datetime:
    """The database's clock, so that processes whose own clocks differ agree on what has run out.

    SQLite has none, and needs none: all its users are on one machine.
    """
    if session.get_bind().dialect.name == "postgresql":
        moment: datetime = session.execute(func.clock_timestamp(type_=UtcDateTime())).scalar_one()
        return moment
    return now()


_INSERTS: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


def insert_into(session: Session, model: type[Base]) -> Any:
    """An INSERT with ON CONFLICT, which both databases have, but not SQLAlchemy's common one."""
    return _INSERTS[session.get_bind().dialect.name](model)


def new_id(prefix: str) -> str:
    """A random public id: ``prefix`` and 24 letters or digits in lower case."""
    number = secrets.randbelow(len(_ALPHABET) ** _LETTERS)  # one draw, since every request has an id
    letters = []
    for _ in range(_LETTERS):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return prefix + "".join(letters)


def make_engine(url: str) -> Engine:
    """Open the database. SQLite is put in WAL mode with foreign keys and a 10 s busy timeout.

    Errors do not show what was to be written or looked for: logs have them.
    """
    if url.startswith("sqlite"):
        engine = create_engine(url, hide_parameters=True)
    else:
        engine = create_engine(url, pool_pre_ping=True, pool_size=MAX_CONNECTIONS, max_overflow=0, hide_parameters=True)
    if engine.dialect.name == "sqlite":
        if engine.url.database:
            Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            # pysqlite must not begin transactions by itself: _begin does.
            connection.isolation_level = None
            for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=10000", "synchronous=NORMAL"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # Writers take their lock at BEGIN: a read lock that is upgraded later fails at once when another
            # process writes in between, whatever the busy timeout. Pure readers never wait for a writer.
            read_only = connection.get_execution_options().get(READ_ONLY, False)
            connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions that keep loaded values after a commit, so that responses need no second query."""
    return sessionmaker(engine, expire_on_commit=False)


def make_read_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions that only read; on SQLite they take no write lock."""
    return sessionmaker(engine.execution_options(**{READ_ONLY: True}), expire_on_commit=False)


def make_glance_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions for single reads: on PostgreSQL without a transaction, which would be two more journeys to it."""
    if engine.dialect.name == "sqlite":
        return make_read_sessions(engine)
    return sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"), expire_on_commit=False)
