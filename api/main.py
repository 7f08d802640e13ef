"""The ASGI app: ``uvicorn --factory api.main:create_app``."""

from __future__ import annotations

import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from sqlalchemy.orm import configure_mappers

from api.handlers import install_handlers
from api.metrics.exposition import new_registry
from api.metrics.instruments import RequestMetrics
from api.metrics.service import DatabaseCollector
from api.middleware import BodyLimit, RequestContext
from api.openapi import document, operation_id
from api.queue import TaskQueue
from api.resources import open_resources
from api.router import PUBLIC_ROUTES, include_routers
from api.settings import Settings
from api.stopping import Stopping
from api.telemetry import configure_logging
from api.tracing import configure_tracing, stop_tracing


def create_app(settings: Settings | None = None, *, queue: TaskQueue | None = None) -> FastAPI:
    """Build the app. Nothing is opened before it starts.

    Args:
        settings: None reads them from the environment.
        queue: replaces the broker of the settings.
    """
    settings = settings or Settings()
    configure_logging(level=settings.log_level, format=settings.log_format)
    metrics, stopping = new_registry(), Stopping()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_tracing("api")
        async with open_resources(settings, queue=queue) as resources:
            app.state.resources = resources
            collector = DatabaseCollector(
                resources.read_sessions, base_models=settings.base_models, engine_ttl=settings.engine_ttl
            )
            metrics.register(collector)
            # Those who wait for a job would keep the server for a minute.
            stopping.on_signal(resources.jobs.stop, delay=settings.drain_delay)
            if threading.current_thread() is threading.main_thread():  # the process is the server's
                _spare_the_collector()
            yield
            metrics.unregister(collector)
        stop_tracing()

    app = FastAPIOffline(  # the page of the calls works without a network
        title="UORA",
        description="OpenAI-compatible fine-tuning and inference.",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        generate_unique_id_function=operation_id,
        # A redirect would lose the body's method on some clients; an unknown path is a clear 404.
        redirect_slashes=False,
    )
    app.state.metrics, app.state.stopping = metrics, stopping
    include_routers(app)
    document(app, public_routes=PUBLIC_ROUTES)
    install_handlers(app)
    app.add_middleware(
        BodyLimit,
        max_json_bytes=settings.max_json_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_part_bytes=settings.max_part_bytes,
        max_adapter_bytes=settings.max_adapter_bytes,
    )
    # Added last, so outermost.
    app.add_middleware(RequestContext, metrics=RequestMetrics(metrics), stopping=stopping)
    return app


def _spare_the_collector() -> None:
    """Let the garbage collector look no more at what is there for good: modules, routes, mappers. A look at all of it
    takes 150 ms, several times in a minute, in which nobody is answered."""
    configure_mappers()
    gc.collect()
    gc.freeze()
