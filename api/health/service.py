"""Is this process alive, and can it do its work?"""

from __future__ import annotations

import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.completions.engine import EngineClient
from api.errors import ApiError
from api.health.schemas import Check, Readiness
from api.resources import Resources

log = structlog.get_logger(__name__)


async def check(resources: Resources) -> Readiness:
    """Ask every part that requests need."""
    checks = {
        "database": await run_in_threadpool(_check_database, resources.read_sessions),
        "engine": await _check_engine(resources.engine),
    }
    ready = all(part.status == "ok" for part in checks.values())
    return Readiness(status="ready" if ready else "not_ready", checks=checks)


def _check_database(sessions: sessionmaker[Session]) -> Check:
    try:
        with sessions() as session:
            revision = session.scalar(text("SELECT version_num FROM alembic_version"))
    except Exception:
        log.exception("database_not_ready")
        return Check(
            status="unavailable", detail="The database does not answer, or 'alembic upgrade head' has not run."
        )
    return Check(status="ok", detail=f"revision {revision}")


async def _check_engine(engine: EngineClient) -> Check:
    try:
        served = await engine.ready()
    except ApiError as error:
        return Check(status="unavailable", detail=error.message)
    return Check(status="ok", detail=f"serves {served}")
