"""``/healthz`` for restarts, ``/readyz`` for load balancers. Public."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.dependencies import ResourcesDep
from api.health import service
from api.health.schemas import Alive, Readiness

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Alive:
    """Say that the process answers, whatever the other parts do."""
    return Alive()


@router.get("/readyz", responses={503: {"model": Readiness}})
async def readyz(request: Request, response: Response, resources: ResourcesDep) -> Readiness:
    """Say whether the database answers, an engine is live and this process stays; 503 if not."""
    readiness = await service.check(resources, stopping=bool(request.app.state.stopping))
    response.status_code = 200 if readiness.status == "ready" else 503
    return readiness
