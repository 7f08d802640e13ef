"""Engines serve every project, so these functions take no project id. All times are the database's."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from api.database import database_now
from api.engines.models import EngineReplica, Load


def add(session: Session, *, engine_id: str, url: str, base_model: str, base_digest: str, capacity: int) -> None:
    """Insert an engine that can answer from now on; who answered at its address before is gone."""
    moment = database_now(session)
    session.execute(delete(EngineReplica).where(EngineReplica.url == url))
    session.add(
        EngineReplica(
            id=engine_id,
            created_at=moment,
            heartbeat_at=moment,
            url=url,
            base_model=base_model,
            base_digest=base_digest,
            capacity=capacity,
        )
    )
    session.flush()


def renew(session: Session, engine_id: str, load: Load) -> bool:
    """Write a heartbeat; False if the engine's row is gone."""
    renewed = session.execute(
        update(EngineReplica)
        .where(EngineReplica.id == engine_id)
        .values(heartbeat_at=database_now(session), **load)
        .returning(EngineReplica.id)
        .execution_options(synchronize_session=False)
    )
    return renewed.one_or_none() is not None


def remove(session: Session, engine_id: str) -> None:
    """Delete an engine that leaves."""
    session.execute(delete(EngineReplica).where(EngineReplica.id == engine_id))


def remove_silent(session: Session, *, silence: timedelta) -> list[str]:
    """Delete the engines that gave no heartbeat for ``silence``; returns their URLs."""
    before = database_now(session) - silence
    return list(
        session.scalars(delete(EngineReplica).where(EngineReplica.heartbeat_at < before).returning(EngineReplica.url))
    )


def live(session: Session, *, ttl: timedelta) -> list[tuple[EngineReplica, timedelta]]:
    """The engines that gave a heartbeat within ``ttl``, the oldest engine first, each with its heartbeat's age."""
    moment = database_now(session)
    rows = session.scalars(
        select(EngineReplica).where(EngineReplica.heartbeat_at > moment - ttl).order_by(EngineReplica.seq)
    )
    return [(row, moment - row.heartbeat_at) for row in rows]
