"""Pages: what they are rendered with, and what holds for every answer below ``/dashboard``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse, Response

from api.browser_sessions import COOKIE, BrowserSessions
from api.caller import Caller
from api.dashboard.assets import VERSION
from api.errors import ApiError, NotAuthenticated

HOME = "/dashboard/jobs"
SIGN_IN = "/dashboard/sign-in"

#: Nothing is loaded from elsewhere, and no script or style of a page runs: all of ours are files.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals["static"] = f"/dashboard/static/{VERSION}"


def render(template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page. ``caller`` is None on pages that nobody has signed in for."""
    shown = {"caller": None, "csrf_token": "", **values}
    return HTMLResponse(_templates.get_template(template).render(shown), status_code=status)


def local_path(wanted: str | None) -> str:
    """Where to go after signing in: a page of the dashboard, whatever a link says."""
    inside = wanted is not None and wanted.isascii() and wanted.isprintable() and "\\" not in wanted
    return wanted if inside and wanted is not None and wanted.startswith("/dashboard/") else HOME


def wants_page(request: Request) -> bool:
    """Whether a browser shows the answer; programs get the API's errors."""
    return "text/html" in request.headers.get("accept", "")


class PageRoute(APIRoute):
    """A route whose answers, errors too, are pages for browsers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, with errors as pages and the headers of all pages."""
        handle = super().get_route_handler()

        async def handle_page(request: Request) -> Response:
            try:
                response = await handle(request)
            except ApiError as error:
                if not wants_page(request):
                    raise
                response = _error_page(request, error)
            response.headers.update(HEADERS)
            return response

        return handle_page


class PageRouter(APIRouter):
    """The router of pages, which are no part of the documented API."""

    def __init__(self, **options: Any) -> None:
        super().__init__(route_class=PageRoute, include_in_schema=False, **options)


def page(request: Request, template: str, caller: Caller, **values: Any) -> HTMLResponse:
    """A page of a caller, who may have come with a key instead of a cookie."""
    return render(template, caller=caller, csrf_token=csrf_token(request), path=request.url.path, **values)


def csrf_token(request: Request) -> str:
    """The token of the request's session; empty without one."""
    cookie = request.cookies.get(COOKIE)
    sessions: BrowserSessions = request.app.state.resources.browser_sessions
    return "" if cookie is None else sessions.csrf_token(cookie)


def _error_page(request: Request, error: ApiError) -> Response:
    if isinstance(error, NotAuthenticated):
        wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{SIGN_IN}?{urlencode({'next': wanted})}", status_code=303)
    return render("error.html", status=error.status, error=error)
