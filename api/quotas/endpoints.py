"""Quotas of projects, below ``/v1/organization``, and what the caller's project has used of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path
from starlette.concurrency import run_in_threadpool

from api.auth import CallerDep
from api.caller import Caller
from api.dependencies import ReadSessionDep, ResourcesDep, WorkDep
from api.pagination import ListObject
from api.quotas import service
from api.quotas.models import QUOTAS, Quotas
from api.quotas.schemas import ProjectQuotas, QuotasUpdate, QuotaUse, QuotaUses, RateLimit, RateLimitUpdate
from api.resources import Resources
from api.routing import Router
from api.usage import service as usage

router = Router(tags=["usage"])


@router.get("/organization/projects/{project_id}/quotas")
def get_quotas(project_id: str, caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep) -> ProjectQuotas:
    """What a project may have; 0 is no limit."""
    project = service.get(session, caller, project_id)
    return ProjectQuotas.of(project, Quotas.of(project, resources.settings))


@router.post("/organization/projects/{project_id}/quotas")
def update_quotas(
    project_id: str, body: QuotasUpdate, caller: CallerDep, work: WorkDep, resources: ResourcesDep
) -> ProjectQuotas:
    """Change what a project may have. Raising it needs an organization-wide key."""
    project = service.update(work, caller, project_id, body, settings=resources.settings)
    return ProjectQuotas.of(project, Quotas.of(project, resources.settings))


@router.get("/organization/projects/{project_id}/rate_limits")
def list_rate_limits(
    project_id: str, caller: CallerDep, session: ReadSessionDep, resources: ResourcesDep
) -> ListObject[RateLimit]:
    """A project's requests and tokens per minute, as OpenAI's client lists them: one for all models."""
    project = service.get(session, caller, project_id)
    return ListObject.whole([RateLimit.of(Quotas.of(project, resources.settings))])


@router.post("/organization/projects/{project_id}/rate_limits/{rate_limit_id}")
def update_rate_limit(
    project_id: str,
    _rate_limit_id: Annotated[Literal["rl-all-models"], Path(alias="rate_limit_id")],
    body: RateLimitUpdate,
    caller: CallerDep,
    work: WorkDep,
    resources: ResourcesDep,
) -> RateLimit:
    """Change them. Raising them needs an organization-wide key."""
    project = service.update(work, caller, project_id, body.quotas(), settings=resources.settings)
    return RateLimit.of(Quotas.of(project, resources.settings))


@router.get("/usage/quotas")
async def get_quota_uses(caller: CallerDep, resources: ResourcesDep) -> QuotaUses:
    """What the project may have, and what it has used of it."""
    used = await run_in_threadpool(_used, resources, caller)
    windows = await resources.limits.windows(caller)
    minutes = {f"{of}_per_minute": window for of, window in windows.items()}
    used |= {name: window.limit - window.remaining for name, window in minutes.items()}
    resets = {name: round(window.seconds_left, 3) for name, window in minutes.items()}
    return QuotaUses(
        data=[
            QuotaUse(name=name, limit=getattr(caller.quotas, name), used=used.get(name), resets_in=resets.get(name))
            for name in QUOTAS
        ]
    )


def _used(resources: Resources, caller: Caller) -> dict[str, int]:
    with resources.read_sessions() as session:
        stored = usage.bytes_stored(session, caller).total
        return service.count_jobs(session, caller) | {"bytes_stored": stored}
