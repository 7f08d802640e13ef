"""What a server counts of its requests: the api and the engine alike."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from prometheus_client import CollectorRegistry, Histogram
from starlette.types import Scope

#: From an answer out of memory to a long poll, or to all that an answer may take.
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
#: Others come from clients, who could make as many series as they like.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: In the place of the route: what led to none, and the pages that FastAPI adds by itself.
NO_ROUTE = "none"


class RequestMetrics:
    """Requests by the route's template, method and status, never by what a client put into a path.

    The lock-guarded sum of each such kind is looked up once and kept: a request costs a look into a dict and an
    observation.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "uora_request_seconds",
            "Requests, from their first byte to the last of the answer, streams and long polls included.",
            ("route", "method", "status"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._kinds: dict[tuple[int, str, int | None], Histogram] = {}
        self._templates: dict[int, str] = {}

    def observe(self, scope: Scope, status: int | None, seconds: float) -> None:
        """Count a request.

        Args:
            scope: as routing has left it.
            status: None if the connection was lost before an answer began.
            seconds: that it took.
        """
        kind = (id(scope.get("route")), scope["method"], status)
        found = self._kinds.get(kind)
        if found is None:
            method = scope["method"] if scope["method"] in METHODS else "other"
            found = self._seconds.labels(self.template(scope), method, str(status or "none"))
            if method != "other":
                self._kinds[kind] = found
        found.observe(seconds)

    def template(self, scope: Scope) -> str:
        """The path of the route that a request was led to, with the names of its parameters."""
        route = scope.get("route")
        if route is None:
            return NO_ROUTE
        if not self._templates:  # a route does not know the prefix that it was included with; its context does
            app: FastAPI = scope["app"]
            self._templates = {id(each.original_route): str(each.path) for each in iter_route_contexts(app.routes)}
        return self._templates.get(id(route), NO_ROUTE)
