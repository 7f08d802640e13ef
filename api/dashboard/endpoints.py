"""``/dashboard``: pages over the same ``/v1`` that programs use."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Form, Request
from starlette.responses import RedirectResponse, Response

from api.auth import CallerDep
from api.browser_sessions import COOKIE, LIFETIME
from api.dashboard import service
from api.dashboard.assets import Assets
from api.dashboard.pages import HOME, SIGN_IN, PageRouter, local_path, page, render
from api.dependencies import ReadSessionDep, ResourcesDep
from api.errors import MissingScope, NotAuthenticated
from api.jobs import service as jobs

router = PageRouter(prefix="/dashboard")


def include_dashboard(app: FastAPI) -> None:
    """Mount the pages and what they load."""
    app.include_router(router)
    app.mount("/dashboard/static", Assets(), name="dashboard-static")


@router.get("")
async def open_dashboard(_caller: CallerDep) -> Response:
    """The first page."""
    return RedirectResponse(HOME, status_code=303)


@router.get("/")
async def open_dashboard_folder(_caller: CallerDep) -> Response:
    """The same."""
    return RedirectResponse(HOME, status_code=303)


@router.get("/sign-in")
async def show_sign_in(next: str | None = None) -> Response:
    """The form."""
    return render("sign-in.html", next=local_path(next), message=None)


@router.post("/sign-in")
def sign_in(
    request: Request,
    resources: ResourcesDep,
    key: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = HOME,
) -> Response:
    """Begin a session."""
    service.check_same_origin(request)
    try:
        cookie = service.begin_session(resources, key)
    except (NotAuthenticated, MissingScope) as error:
        return render("sign-in.html", status=error.status, next=local_path(next), message=error.message)
    response = RedirectResponse(local_path(next), status_code=303)
    response.set_cookie(
        COOKIE,
        cookie,
        max_age=int(LIFETIME.total_seconds()),
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session of this browser."""
    service.check_same_origin(request)
    response = RedirectResponse(SIGN_IN, status_code=303)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax", secure=request.url.scheme == "https")
    return response


@router.get("/jobs")
async def show_jobs(request: Request, caller: CallerDep) -> Response:
    """All jobs."""
    return page(request, "jobs.html", caller)


@router.get("/jobs/new")
async def show_new_job(request: Request, caller: CallerDep) -> Response:
    """The form of a new job, or of a clone."""
    return page(request, "new-job.html", caller)


@router.get("/jobs/{job_id}")
def show_job(request: Request, job_id: str, caller: CallerDep, session: ReadSessionDep) -> Response:
    """One job."""
    job = jobs.get(session, caller, job_id)
    return page(request, "job.html", caller, job_id=job.id)


@router.get("/playground")
async def show_playground(request: Request, caller: CallerDep) -> Response:
    """Models side by side."""
    return page(request, "playground.html", caller)


@router.get("/models")
async def show_models(request: Request, caller: CallerDep) -> Response:
    """All models."""
    return page(request, "models.html", caller)


@router.get("/usage")
async def show_usage(request: Request, caller: CallerDep) -> Response:
    """What the project has used, and its quotas."""
    return page(request, "usage.html", caller)


@router.get("/keys")
async def show_keys(request: Request, caller: CallerDep) -> Response:
    """The project's keys."""
    return page(request, "keys.html", caller)
