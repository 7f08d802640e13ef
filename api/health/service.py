"""Is this process alive, and can it do its work?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.engines.service import EngineDirectory
from api.health.schemas import Check, Readiness
from api.resources import Resources

log = structlog.get_logger(__name__)


async def check(resources: Resources, *, stopping: bool = False) -> Readiness:
    """Ask every part that requests need, and say whether the process is about to end."""
    checks = {
        "database": await run_in_threadpool(_check_database, resources.read_sessions),
        "engines": await _check_engines(resources.engines, resources.settings.base_models),
    }
    if stopping:
        checks["process"] = Check(status="unavailable", detail="It was told to stop, and takes no more requests soon.")
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


async def _check_engines(engines: EngineDirectory, base_models: Iterable[str]) -> Check:
    """One live engine is enough: an api that is taken out for want of another answers nobody."""
    try:
        live = Counter(engine.base_model for engine in await engines.live())
    except Exception:
        log.exception("engines_not_known")
        return Check(status="unavailable", detail="The database, where engines register, does not answer.")
    detail = ", ".join(f"{name}: {live[name]} live" for name in dict.fromkeys((*base_models, *live)))
    return Check(status="ok" if live else "unavailable", detail=detail)
