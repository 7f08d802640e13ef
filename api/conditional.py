"""ETags: a client that has what it asks for is told so, without the rows (RFC 9110)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Self

from starlette.requests import Request
from starlette.responses import Response

#: A copy may be kept by the client that it was given to, and has to be asked about before each use.
_CACHE_CONTROL = "private, no-cache"
#: Of a route that answers `not_modified`.
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing changed since `If-None-Match`."}}
#: Of such a route too: the header is read by hand, since a declared one costs a poll more than its statement.
IF_NONE_MATCH: dict[str, Any] = {
    "parameters": [
        {
            "name": "If-None-Match",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "ETag of the answer that the client has.",
        }
    ]
}


@dataclass(frozen=True)
class Condition:
    """``If-None-Match`` of a request."""

    if_none_match: str | None

    @classmethod
    def of(cls, request: Request) -> Self:
        """What the client says that it has."""
        return cls(request.headers.get("if-none-match"))

    def met_by(self, tag: str) -> bool:
        """Whether the client has the answer with this tag. Proxies that compress make a tag a weak one."""
        if self.if_none_match is None:
            return False
        sent = [each.strip().removeprefix("W/") for each in self.if_none_match.split(",")]
        return tag in sent or "*" in sent


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
