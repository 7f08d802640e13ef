"""The ASGI app: ``uvicorn --factory api.main:create_app``."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from sqlalchemy.orm import configure_mappers

from api.handlers import install_handlers
from api.middleware import BodyLimit, RequestContext
from api.openapi import document, operation_id
from api.queue import TaskQueue
from api.resources import open_resources
from api.router import PUBLIC_ROUTES, include_routers
from api.settings import Settings
from api.telemetry import configure_logging


def create_app(settings: Settings | None = None, *, queue: TaskQueue | None = None) -> FastAPI:
    """Build the app. Nothing is opened before it starts.

    Args:
        settings: None reads them from the environment.
        queue: replaces the broker of the settings.
    """
    settings = settings or Settings()
    configure_logging()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_resources(settings, queue=queue) as resources:
            app.state.resources = resources
            if threading.current_thread() is threading.main_thread():  # the process is the server's
                _on_stop_signal(resources.jobs.stop)
                _spare_the_collector()
            yield

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
    app.add_middleware(RequestContext)  # added last, so outermost
    return app


def _spare_the_collector() -> None:
    """Let the garbage collector look no more at what is there for good: modules, routes, mappers. A look at all of it
    takes 150 ms, several times in a minute, in which nobody is answered."""
    configure_mappers()
    gc.collect()
    gc.freeze()


def _on_stop_signal(action: Callable[[], None]) -> None:
    """Act as soon as the server is told to stop: it lets all requests end before it ends the lifespan, and those who
    wait for a job would keep it for a minute."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        servers = signal.getsignal(number)
        if not callable(servers):
            continue  # it does not end its requests first, or is told in another way

        def handle(
            number: int, frame: FrameType | None, servers: Callable[[int, FrameType | None], object] = servers
        ) -> None:
            loop.call_soon_threadsafe(action)
            servers(number, frame)

        signal.signal(number, handle)
