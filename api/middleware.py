"""Around every request: its id, its log line, a limit of its body, and an answer when all else failed."""

from __future__ import annotations

import re
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import tracing
from api.database import new_id
from api.errors import ApiError
from api.metrics.instruments import RequestMetrics
from api.stopping import Stopping

log = structlog.get_logger(__name__)

#: The only routes whose body goes to a file, and only after the key was checked; all others hold it in memory.
UPLOAD_PATH = "/v1/files"
IMPORT_PATH = "/v1/models"
PART_PATH = re.compile(r"/v1/uploads/[^/]+/parts")
#: What this service calls its requests.
REQUEST_ID = re.compile(r"req_[a-z0-9]{24}")
#: Boundaries and fields around an uploaded file.
MULTIPART_OVERHEAD_BYTES = 64 * 1024


class RequestContext:
    """Give each request an id, in the answer's ``x-request-id`` and in all log lines; count it, trace it, and catch
    what nobody did.

    Args:
        app: what it is around.
        metrics: where requests are counted.
        stopping: whether the process is about to end; connections are then closed behind their answers.
        internal: whether requests come from another of our processes, whose request's id and trace go on.
    """

    def __init__(self, app: ASGIApp, *, metrics: RequestMetrics, stopping: Stopping, internal: bool = False) -> None:
        self._app = app
        self._metrics = metrics
        self._stopping = stopping
        self._internal = internal
        self._log = log.bind()  # once: each line of the module's own logger would put one together

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif tracing.is_on():
            await self._traced(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _traced(self, scope: Scope, receive: Receive, send: Send) -> None:
        parent = Headers(scope=scope).get(tracing.HEADER)
        with tracing.server_span(scope["method"], parent=parent, trusted=self._internal) as span:
            status = await self._serve(scope, receive, send)
            route = self._metrics.template(scope)
            span.rename(f"{scope['method']} {route}")
            state = scope["state"]
            span.set(http_route=route, http_response_status__code=status, uora_project__id=state.get("project_id"))
            span.set(uora_request__id=state["request_id"])
            if status is None or status >= 500:
                span.fail(f"status {status}")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> int | None:
        """Serve it; the status of the answer, None if none began."""
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(scope["state"].get("answer_headers", {}))
                if self._stopping:
                    headers["connection"] = "close"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                log.exception("unhandled_error", method=scope["method"], path=scope["path"])
                if status is not None:
                    raise  # the answer has begun: only breaking it off tells the client
                await _internal_error()(scope, receive, send_with_id)
            finally:
                seconds = time.perf_counter() - started
                self._metrics.observe(scope, status, seconds)
                self._log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round(seconds * 1000, 1),
                )
        return status

    def _request_id(self, scope: Scope) -> str:
        """A new one, or of a request between our processes, the id of what it is made for."""
        sent = Headers(scope=scope).get("x-request-id", "") if self._internal else ""
        return sent if REQUEST_ID.fullmatch(sent) else new_id("req_")


class BodyLimit:
    """Stop reading a body that is over its limit, told or not by Content-Length."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_json_bytes: int,
        max_upload_bytes: int,
        max_part_bytes: int,
        max_adapter_bytes: int,
    ) -> None:
        self._app = app
        self._max_json_bytes = max_json_bytes
        self._max_bytes = {
            UPLOAD_PATH: max_upload_bytes + MULTIPART_OVERHEAD_BYTES,
            IMPORT_PATH: max_adapter_bytes + MULTIPART_OVERHEAD_BYTES,
        }
        self._max_part_bytes = max_part_bytes + MULTIPART_OVERHEAD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._limit(scope["path"])
        announced = int(headers["content-length"]) if headers.get("content-length", "").isdecimal() else 0
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            if announced > limit:
                raise _too_large(limit)
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, limited_receive, send)

    def _limit(self, path: str) -> int:
        if path.startswith("/v1/uploads/") and PART_PATH.fullmatch(path):
            return self._max_part_bytes
        return self._max_bytes.get(path, self._max_json_bytes)


def _too_large(limit: int) -> HTTPException:
    # Of this class, since FastAPI turns any other that is raised while it reads a body into "400".
    return HTTPException(413, f"The request body has more than {limit} bytes; send less.")


def _internal_error() -> JSONResponse:
    error = ApiError("The server failed to answer this request; its log names the cause under the request id.")
    return JSONResponse(error.body(), status_code=error.status)
