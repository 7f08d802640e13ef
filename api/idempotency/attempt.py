"""What makes two requests the same one.

Either both have the same ``Idempotency-Key``, in one project and on one route; the bodies must be the same then.

Or the second one is a retry by OpenAI's client, which sends no such key: it counts its retries in a header, and they
have the API key, the route and the body of the first attempt. Such a match may be a coincidence, so it is only made
where a repetition would make a second object, and no longer than such a client would wait and retry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, BinaryIO

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from api.auth import CallerDep
from api.caller import Caller
from api.errors import InvalidRequest
from api.idempotency.repository import KEPT
from api.routing import Operation

MAX_KEY_LENGTH = 255
#: What OpenAI's client waits for an answer if it does not say so.
DEFAULT_TIMEOUT = timedelta(seconds=600)
#: Beside the waiting: its pauses before retries, and the way.
RETRY_SLACK = timedelta(seconds=60)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a request that must not be carried out twice."""

    digest: str
    fingerprint: str
    #: Whether it came with an ``Idempotency-Key``.
    has_key: bool
    #: How old the answer to an attempt before may be; zero if this is the first.
    max_age: timedelta

    @property
    def may_be_a_repetition(self) -> bool:
        """Whether an answer may be there already."""
        return self.max_age > timedelta(0)


async def describe_attempt(request: Request, caller: CallerDep) -> Attempt | None:
    """The attempt that this request is; None if it may be carried out as often as it comes.

    Raises:
        InvalidRequest: the key is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if request.method != "POST" or (key is None and not Operation.of(request).creates):
        return None
    if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
        raise InvalidRequest(
            f"Found an Idempotency-Key of {len(key)} characters; expected 1 to {MAX_KEY_LENGTH}.",
            param="Idempotency-Key",
        )
    fingerprint = await _fingerprint(request)
    return Attempt(
        digest=_digest(request, caller, key=key, fingerprint=fingerprint),
        fingerprint=fingerprint,
        has_key=key is not None,
        max_age=KEPT if key is not None else _retrying_time(request),
    )


AttemptDep = Annotated[Attempt | None, Depends(describe_attempt)]


def _digest(request: Request, caller: Caller, *, key: str | None, fingerprint: str) -> str:
    target = f"{request.method} {request.url.path}?{request.url.query}"
    same = ("key", caller.project_id, key) if key is not None else ("retry", caller.key_id, fingerprint)
    return _hash(repr((target, *same)).encode())


def _retrying_time(request: Request) -> timedelta:
    """How long ago the first attempt of this retry can have begun; zero if it is no retry."""
    try:
        retries = int(request.headers.get("x-stainless-retry-count", "0"))
        timeout = float(request.headers.get("x-stainless-read-timeout", DEFAULT_TIMEOUT.total_seconds()))
        waited = timedelta(seconds=retries * timeout)
    except (ValueError, OverflowError):
        return timedelta(0)
    return min(waited + RETRY_SLACK, KEPT) if retries > 0 and waited >= timedelta(0) else timedelta(0)


async def _fingerprint(request: Request) -> str:
    """Hash of the body; of a multipart one, of its parts, since each attempt has another boundary between them."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        digest = hashlib.sha256()
        async for chunk in request.stream():  # what FastAPI has read already, else in pieces
            digest.update(chunk)
        return digest.hexdigest()
    form = await request.form(max_files=1, max_fields=16)
    parts = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            parts.append((name, value.filename, await run_in_threadpool(_hash_file, value.file)))
        else:
            parts.append((name, None, value))
    return _hash(repr(sorted(parts, key=repr)).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_file(file: BinaryIO) -> str:
    """Hash of a spooled file, read in pieces and then put back to its beginning."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    file.seek(0)
    return digest.hexdigest()
