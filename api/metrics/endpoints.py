"""``/metrics`` in Prometheus's text format. It asks for no API key, but for the operator's token."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from api.dependencies import ResourcesDep
from api.errors import NotAuthenticated
from api.metrics.exposition import REFUSAL, exposition, may_read

router = APIRouter(tags=["health"])


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, resources: ResourcesDep) -> Response:
    """This process's own metrics, and what the database knows of the installation."""
    client = request.client.host if request.client else None
    if not may_read(resources.settings.metrics_token, client=client, headers=request.headers):
        raise NotAuthenticated(REFUSAL)
    registry: CollectorRegistry = request.app.state.metrics
    return exposition(registry, accept=request.headers.get("accept", ""))
