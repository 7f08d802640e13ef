"""Bearer keys. The same steps are taken for every key, known or not.

A key that was found good is taken as good for `CALLER_SECONDS` without a look into the database: a revoked one is
refused within that time, by every process.
"""

from __future__ import annotations

import hmac
from datetime import timedelta
from functools import partial
from typing import Annotated

import structlog
from fastapi import Depends, Request
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.caller import Caller
from api.database import now
from api.errors import NotAuthenticated, ProjectMismatch
from api.projects import repository
from api.projects.models import ApiKey, Project
from api.projects.service import hash_key
from api.resources import Resources

log = structlog.get_logger(__name__)

#: How exact ``last_used_at`` is. Writing it for each request would make every read a write.
LAST_USED_STEP = timedelta(minutes=1)


async def current_caller(request: Request) -> Caller:
    """The caller of this request. It reads the headers itself: as declared parameters they cost more than the rest.

    Raises:
        NotAuthenticated: no key, an unknown or a revoked one.
        ProjectMismatch: the key is of another project than the header names.
    """
    resources: Resources = request.app.state.resources
    authorization, openai_project = request.headers.get("authorization"), request.headers.get("openai-project")
    find = partial(run_in_threadpool, _find_caller, resources, authorization, openai_project)
    return await resources.callers.get(f"{authorization}\n{openai_project}", find)


def _find_caller(resources: Resources, authorization: str | None, openai_project: str | None) -> Caller:
    """Read in a transaction of its own, which ends before the endpoint starts."""
    with resources.read_sessions() as session:
        key, project = _authenticate(session, _bearer(authorization))
    if openai_project not in (None, "", project.id, project.slug):
        raise ProjectMismatch("The OpenAI-Project header names another project than the API key's; leave it out.")
    _note_use(resources.sessions, key)
    return Caller(project_id=project.id, project_slug=project.slug, key_id=key.id)


#: The access rule: a route whose endpoint takes it serves the key's project and nothing else.
CallerDep = Annotated[Caller, Depends(current_caller)]


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise NotAuthenticated("No API key was given; send it as 'Authorization: Bearer <key>'.")
    return key.strip()


def _authenticate(session: Session, key: str) -> tuple[ApiKey, Project]:
    digest = hash_key(key)
    found = repository.find_key(session, digest)
    known = found is not None and hmac.compare_digest(found[0].secret_sha256, digest)
    if found is None or not known or found[0].revoked_at is not None:
        raise NotAuthenticated("The API key is unknown or revoked; check it, or ask for a new one.")
    return found


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
