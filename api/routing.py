"""Routes that show their answer to the unit of work before it commits, so that it can be kept in the same transaction.

FastAPI ends dependencies of ``scope="function"``, hence the transaction, after it has made the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

#: What operations do, by the first word of their endpoint's name, and how the audit log says it.
VERBS = {
    "create": "created",
    "import": "imported",
    "update": "updated",
    "rotate": "rotated",
    "delete": "deleted",
    "archive": "archived",
    "cancel": "cancelled",
    "pause": "paused",
    "resume": "resumed",
    "promote": "promoted",
    "retry": "retried",
    "clone": "cloned",
    "complete": "completed",
    "estimate": "estimated",
}
#: What they do it to, where the rest of the name does not say it as OpenAI's audit log does.
NOUNS = {
    "admin_api_key": "api_key",
    "permission": "checkpoint.permission",
    "permissions": "checkpoint.permission",
    "endpoint": "webhook_endpoint",
    "part": "upload.part",
    "secret": "webhook_endpoint.secret",
}
#: Verbs that make something new each time, so that a repetition is a second one.
CREATING = frozenset({"create", "import", "rotate", "retry", "clone", "complete"})


@dataclass(frozen=True)
class Operation:
    """What a route does, as its endpoint's name says: ``create_api_key``."""

    verb: str
    noun: str

    @classmethod
    def of(cls, request: Request) -> Operation:
        """The operation of the route that the request was led to."""
        verb, _, noun = str(request.scope["route"].name).partition("_")
        return cls(verb=verb, noun=noun)

    @property
    def action(self) -> str:
        """What the audit log calls it: ``api_key.created``."""
        return f"{NOUNS.get(self.noun, self.noun)}.{VERBS.get(self.verb, self.verb)}"

    @property
    def creates(self) -> bool:
        """Whether to do it twice makes two."""
        return self.verb in CREATING


class RecordedRoute(APIRoute):
    """A route whose answer the request's unit of work can read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, with the answer kept in ``request.state.answer``."""
        handle = super().get_route_handler()

        async def handle_and_show(request: Request) -> Response:
            response = await handle(request)
            request.state.answer = response
            return response

        return handle_and_show


class Router(APIRouter):
    """The router of every domain."""

    def __init__(self, **options: Any) -> None:
        super().__init__(route_class=RecordedRoute, **options)
