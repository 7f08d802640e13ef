"""Bearer keys, and sessions of browsers that stand for one. The same steps are taken for every key, known or not.

A key that was found good is taken as good for `CALLER_SECONDS` without a look into the database: a revoked one is
refused within that time, by every process.
"""

from __future__ import annotations

import hmac
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated

import structlog
from fastapi import Depends, Request
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.browser_sessions import COOKIE, CSRF_HEADER, SAFE_METHODS
from api.caller import Caller
from api.database import now
from api.errors import NotAuthenticated, ProjectMismatch
from api.projects import repository
from api.projects.models import ApiKey, Project
from api.projects.service import hash_key
from api.quotas.models import Quotas
from api.resources import Resources
from api.scopes import needed_scope, split_scopes

log = structlog.get_logger(__name__)

#: How exact ``last_used_at`` is. Writing it for each request would make every read a write.
LAST_USED_STEP = timedelta(minutes=1)


async def current_caller(request: Request) -> Caller:
    """The caller of this request. It reads the headers itself: as declared parameters they cost more than the rest.

    A browser's cookie counts only where no key is sent, and for changes only with its token.

    Raises:
        NotAuthenticated: no key, or an unknown, revoked or expired one; or the session is over.
        ProjectMismatch: the key is of another project than the header names.
        CsrfTokenInvalid: a change with the cookie alone.
        MissingScope: the key may not do what the route does.
    """
    resources: Resources = request.app.state.resources
    authorization, openai_project = request.headers.get("authorization"), request.headers.get("openai-project")
    cookie = request.cookies.get(COOKIE) if authorization is None else None
    find = partial(run_in_threadpool, _find_sender, resources, authorization, cookie, openai_project)
    # With quotes around each, so that none of them can pose as another.
    caller = await resources.callers.get(repr((authorization, cookie, openai_project)), find)
    if cookie is not None and request.method not in SAFE_METHODS:
        resources.browser_sessions.check_csrf(cookie, request.headers.get(CSRF_HEADER))
    request.state.project_id = caller.project_id
    caller.require(needed_scope(request.method, request.url.path))
    return caller


def _find_sender(
    resources: Resources, authorization: str | None, cookie: str | None, openai_project: str | None
) -> Caller:
    if authorization is None and cookie is not None:
        digest = resources.browser_sessions.key_digest(cookie)
    else:
        digest = hash_key(_bearer(authorization))
    return find_caller(resources, digest, openai_project=openai_project)


def find_caller(resources: Resources, digest: str, *, openai_project: str | None = None) -> Caller:
    """Who has the key of this digest. Read in a transaction of its own, which ends before the endpoint starts.

    Raises:
        NotAuthenticated: the key is unknown, revoked or expired.
        ProjectMismatch: it is of another project.
    """
    with resources.read_sessions() as session:
        key, project = _authenticate(session, digest)
    if openai_project not in (None, "", project.id, project.slug):
        raise ProjectMismatch("The OpenAI-Project header names another project than the API key's; leave it out.")
    _note_use(resources.sessions, key)
    return Caller(
        project_id=project.id,
        project_slug=project.slug,
        key_id=key.id,
        scopes=split_scopes(key.scopes),
        organization_wide=key.organization_wide,
        quotas=Quotas.of(project, resources.settings),
    )


#: The access rule: a route whose endpoint takes it serves the key's project and nothing else, to a key with the scope
#: that ``api.scopes`` says.
CallerDep = Annotated[Caller, Depends(current_caller)]


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise NotAuthenticated("No API key was given; send it as 'Authorization: Bearer <key>'.")
    return key.strip()


def _authenticate(session: Session, digest: str) -> tuple[ApiKey, Project]:
    found = repository.find_key(session, digest)
    if found is None or not _is_good(*found, digest):
        raise NotAuthenticated("The API key is unknown, revoked or expired; check it, or ask for a new one.")
    return found


def _is_good(key: ApiKey, project: Project, digest: str) -> bool:
    moment = now()
    current = hmac.compare_digest(key.secret_sha256, digest)
    previous = hmac.compare_digest(key.previous_sha256 or "", digest) and _is_before(moment, key.previous_until)
    usable = key.revoked_at is None and project.archived_at is None
    return (current or previous) and usable and (key.expires_at is None or moment < key.expires_at)


def _is_before(moment: datetime, end: datetime | None) -> bool:
    return end is not None and moment < end


def _note_use(sessions: sessionmaker[Session], key: ApiKey) -> None:
    moment = now()
    if key.last_used_at is not None and moment - key.last_used_at < LAST_USED_STEP:
        return
    try:
        with sessions.begin() as session:
            repository.touch_key(session, key.id, at=moment)
    except SQLAlchemyError:
        # A busy database is no reason to refuse a good key; the next request notes its use.
        log.warning("key_use_not_noted", key_id=key.id, exc_info=True)
