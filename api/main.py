"""The ASGI app: ``uvicorn --factory api.main:create_app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api.handlers import install_handlers
from api.middleware import BodyLimit, RequestContext
from api.queue import TaskQueue
from api.resources import open_resources
from api.router import make_router
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
            yield

    app = FastAPI(
        title="UORA",
        description="OpenAI-compatible fine-tuning and inference.",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # A redirect would lose the body's method on some clients; an unknown path is a clear 404.
        redirect_slashes=False,
    )
    app.include_router(make_router())
    install_handlers(app)
    app.add_middleware(
        BodyLimit,
        max_json_bytes=settings.max_json_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_part_bytes=settings.max_part_bytes,
    )
    app.add_middleware(RequestContext)  # added last, so outermost
    return app
