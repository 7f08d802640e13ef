"""All routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.audit.endpoints import router as audit
from api.classifications.endpoints import router as classifications
from api.completions.endpoints import router as completions
from api.dashboard.endpoints import include_dashboard
from api.estimates.endpoints import router as estimates
from api.files.endpoints import router as files
from api.handlers import ErrorBody
from api.health.endpoints import router as health
from api.jobs.endpoints import router as jobs
from api.metrics.endpoints import router as metrics
from api.models.endpoints import router as models
from api.permissions.endpoints import router as permissions
from api.projects.endpoints import router as projects
from api.quotas.endpoints import router as quotas
from api.reports.endpoints import router as reports
from api.sweeps.endpoints import router as sweeps
from api.uploads.endpoints import router as uploads
from api.usage.endpoints import router as usage
from api.webhooks.endpoints import router as webhooks

#: The only routes that answer without a key. A test walks the routes: any other must ask for a caller.
#: ``/metrics`` has a token of its own instead (`api.metrics.exposition.may_read`).
PUBLIC_ROUTES = frozenset(
    {
        *("/healthz", "/readyz", "/metrics"),
        *("/openapi.json", "/docs", "/docs/oauth2-redirect"),
        *("/dashboard/sign-in", "/dashboard/sign-out"),
    }
)


def include_routers(app: FastAPI) -> None:
    """Mount every domain on the app itself, the polled one first: FastAPI looks through all routes before, once for
    each router around them."""
    responses: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    tuning = (jobs, files, reports, uploads, estimates, sweeps)
    for domain in (
        *tuning,
        permissions,
        models,
        completions,
        classifications,
        webhooks,
        projects,
        audit,
        usage,
        quotas,
    ):
        app.include_router(domain, prefix="/v1", responses=responses)
    app.include_router(health, responses=responses)
    app.include_router(metrics)
    include_dashboard(app)
