"""Signing in."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import Request

from api.auth import find_caller
from api.errors import NotAuthenticated, PermissionDenied
from api.projects.service import hash_key
from api.resources import Resources
from api.scopes import Scope


def begin_session(resources: Resources, key: str) -> str:
    """The cookie of a new session.

    Raises:
        NotAuthenticated: no key, or an unknown, revoked or expired one.
        MissingScope: the key may not read, so that there would be nothing to see.
    """
    key = key.strip()
    if not key:
        raise NotAuthenticated("No API key was given; paste one, which begins with sk-uora-.")
    find_caller(resources, hash_key(key)).require(Scope.READ)
    return resources.browser_sessions.begin(key)


def check_same_origin(request: Request) -> None:
    """Raises ``PermissionDenied`` for a form that another site's page has sent."""
    site = request.headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):
        return
    origin = request.headers.get("origin")
    if site is None and (origin is None or urlsplit(origin).netloc == request.headers.get("host")):
        return  # an older browser, or a program
    raise PermissionDenied("This form was sent by a page of another site; open the dashboard itself and sign in there.")
