"""All routes."""

from __future__ import annotations

from fastapi import APIRouter

from api.audit.endpoints import router as audit
from api.classifications.endpoints import router as classifications
from api.completions.endpoints import router as completions
from api.files.endpoints import router as files
from api.handlers import ErrorBody
from api.health.endpoints import router as health
from api.jobs.endpoints import router as jobs
from api.models.endpoints import router as models
from api.projects.endpoints import router as projects
from api.sweeps.endpoints import router as sweeps

#: The only routes that answer without a key. A test walks the routes: any other must ask for a caller.
PUBLIC_ROUTES = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})


def make_router() -> APIRouter:
    """Mount every domain."""
    router = APIRouter(responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    router.include_router(health)
    for domain in (files, jobs, sweeps, models, completions, classifications, projects, audit):
        router.include_router(domain, prefix="/v1")
    return router
