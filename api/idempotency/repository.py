"""Queries of kept answers."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from api.database import insert_into
from api.idempotency.models import IdempotencyRecord

#: How long an answer is kept for its ``Idempotency-Key``.
KEPT = timedelta(hours=24)


def limit_waiting(session: Session, *, milliseconds: int) -> None:
    """Wait no longer than this for the locks of others; SQLite has its own limit."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.set_config("lock_timeout", str(milliseconds), True)))


def insert(session: Session, *, digest: str, fingerprint: str, at: datetime) -> bool:
    """Insert a record; False if there is one. While another transaction inserts the same, wait for its end."""
    statement = insert_into(session, IdempotencyRecord).values(digest=digest, fingerprint=fingerprint, created_at=at)
    unless_there = statement.on_conflict_do_nothing(index_elements=["digest"]).returning(IdempotencyRecord.seq)
    return session.scalar(unless_there) is not None


def lock(session: Session, digest: str) -> IdempotencyRecord | None:
    """The record, locked until the transaction ends. While another transaction changes it, wait for its end."""
    statement = select(IdempotencyRecord).where(IdempotencyRecord.digest == digest).with_for_update()
    return session.scalar(statement.execution_options(populate_existing=True))


def change(session: Session, digest: str, **values: Any) -> None:
    """Set values of a record."""
    statement = update(IdempotencyRecord).where(IdempotencyRecord.digest == digest).values(**values)
    session.execute(statement.execution_options(synchronize_session=False))


def remove(session: Session, digest: str, *, made_at: datetime) -> None:
    """Forget one, unless another attempt has made it anew."""
    mine = (IdempotencyRecord.digest == digest) & (IdempotencyRecord.created_at == made_at)
    session.execute(delete(IdempotencyRecord).where(mine))


def remove_older(session: Session, than: datetime) -> None:
    """Forget those that were made before."""
    session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.created_at < than))
