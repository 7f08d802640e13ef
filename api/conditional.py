"""ETags: a client that has what it asks for is told so, without the rows (RFC 9110)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header
from starlette.responses import Response

#: A copy may be kept by the client that it was given to, and has to be asked about before each use.
_CACHE_CONTROL = "private, no-cache"
#: Of an endpoint that answers `not_modified`.
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing changed since `If-None-Match`."}}


@dataclass(frozen=True)
class Condition:
    """``If-None-Match`` of a request."""

    if_none_match: str | None

    def met_by(self, tag: str) -> bool:
        """Whether the client has the answer with this tag. Proxies that compress make a tag a weak one."""
        if self.if_none_match is None:
            return False
        sent = [each.strip().removeprefix("W/") for each in self.if_none_match.split(",")]
        return tag in sent or "*" in sent


async def get_condition(if_none_match: Annotated[str | None, Header()] = None) -> Condition:
    """What the client has."""
    return Condition(if_none_match)


ConditionDep = Annotated[Condition, Depends(get_condition)]


def make_tag(*parts: object) -> str:
    """A tag of values that say it all; it has no comma."""
    return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'


def tagged(body: bytes, tag: str) -> Response:
    """JSON that a client can ask about by its tag."""
    return Response(body, media_type="application/json", headers=_headers(tag))


def not_modified(tag: str) -> Response:
    """Nothing but that the client has it already."""
    return Response(status_code=304, headers=_headers(tag))


def _headers(tag: str) -> dict[str, str]:
    return {"ETag": tag, "Cache-Control": _CACHE_CONTROL}
