"""What the process holds open: made when the app starts, closed when it stops."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

import httpx
from fastapi import Depends, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from api.browser_sessions import BrowserSessions
from api.caller import RecentCallers
from api.database import make_engine, make_glance_sessions, make_read_sessions, make_sessions
from api.engines.client import EngineClient
from api.engines.service import EngineDirectory
from api.jobs.watching import JobWatch
from api.queue import CeleryQueue, TaskQueue
from api.quotas.limiting import RateLimits
from api.settings import Settings
from api.storage import LocalStore, ObjectStore
from api.usage.ledger import UsageLedger

#: From the api to an engine of the same installation; longer means that it is not there.
CONNECT_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Resources:
    """Open resources, shared by all requests."""

    settings: Settings
    database: Engine
    sessions: sessionmaker[Session]
    read_sessions: sessionmaker[Session]
    queue: TaskQueue
    storage: ObjectStore
    engines: EngineDirectory
    engine: EngineClient
    jobs: JobWatch
    callers: RecentCallers
    usage: UsageLedger
    limits: RateLimits
    browser_sessions: BrowserSessions


async def get_resources(request: Request) -> Resources:
    """What the lifespan opened."""
    resources: Resources = request.app.state.resources
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


@asynccontextmanager
async def open_resources(settings: Settings, *, queue: TaskQueue | None = None) -> AsyncIterator[Resources]:
    """Open everything that requests share; ``queue`` replaces the one of the settings."""
    database = make_engine(settings.database_url)
    sessions = make_sessions(database)
    usage = UsageLedger(sessions)
    timeout = httpx.Timeout(settings.engine_timeout.total_seconds(), connect=CONNECT_TIMEOUT_SECONDS)
    read_sessions = make_read_sessions(database)
    engines = EngineDirectory(read_sessions, ttl=settings.engine_ttl)
    # No limit of connections: the engine decides how much is too much, and says so.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    try:
        async with (
            usage.open(),
            RateLimits.open(settings) as rate_limits,
            httpx.AsyncClient(timeout=timeout, limits=limits) as client,
        ):
            yield Resources(
                settings=settings,
                database=database,
                sessions=sessions,
                read_sessions=read_sessions,
                queue=queue or CeleryQueue(settings),
                storage=LocalStore(settings.storage_dir),
                engines=engines,
                engine=EngineClient(client, engines, token=settings.engine_token.get_secret_value()),
                callers=RecentCallers(),
                browser_sessions=BrowserSessions(settings.engine_token.get_secret_value()),
                jobs=JobWatch(make_glance_sessions(database)),
                usage=usage,
                limits=rate_limits,
            )
    finally:
        database.dispose()
