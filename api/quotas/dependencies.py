"""What endpoints ask for to keep a project within its quotas before they begin."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from api.auth import CallerDep
from api.caller import Caller
from api.middleware import MULTIPART_OVERHEAD_BYTES
from api.quotas import service
from api.resources import Resources, ResourcesDep


async def admit(request: Request, caller: CallerDep, resources: ResourcesDep) -> Caller:
    """The caller, with the request counted; its limits are in the headers of the answer, whatever that is.

    Raises:
        RateLimited: the project has used up its requests or tokens of this minute.
    """
    request.state.answer_headers = await resources.limits.admit(caller)
    return caller


AdmittedCallerDep = Annotated[Caller, Depends(admit)]


async def check_room(request: Request, caller: CallerDep, resources: ResourcesDep) -> None:
    """Refuse an upload before its body is read, where its ``Content-Length`` says that it is too much.

    Raises:
        StorageQuotaExceeded: the project would have more bytes than it may.
    """
    if caller.quotas.bytes_stored:
        length = request.headers.get("content-length", "")
        announced = int(length) - MULTIPART_OVERHEAD_BYTES if length.isdecimal() else 0
        await run_in_threadpool(_look, resources, caller, max(announced, 1))


def _look(resources: Resources, caller: Caller, added: int) -> None:
    with resources.read_sessions() as session:
        service.look_at_bytes(session, caller, added=added)


RoomDep = Annotated[None, Depends(check_room)]
