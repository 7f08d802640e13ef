"""Errors of the HTTP service. They know status codes, not FastAPI, so that the worker can use the services.

```
ApiError 500 internal_error
  ├── InvalidRequest 400          a value that cannot be used; names its parameter
  │     ├── UnsupportedParameter    a parameter of OpenAI's that is not offered here
  │     ├── UploadNotPending        parts can no longer be added to it, or put together
  │     ├── JobNotCancellable       the job has ended
  │     ├── JobNotPausable          it has ended, or is being cancelled
  │     ├── JobNotResumable         it is not paused, and has not failed with a state to go on from
  │     ├── JobNotDeletable         the job has not ended
  │     ├── JobNotRetryable         it has neither failed nor been cancelled
  │     ├── WebhookUnreachable      no answer to a sample event
  │     └── NotPromotable           the job has no model, or no checkpoint that would be the best
  ├── NotAuthenticated 401
  │     └── ProjectMismatch         the key is of another project than the OpenAI-Project header says
  ├── PermissionDenied 403
  │     ├── MissingScope            the key may not do this; the message names the scope
  │     ├── CsrfTokenInvalid        a change that came with a browser's session, but not from its pages
  │     └── OrganizationKeyRequired the key administers its own project only
  ├── NotFound 404                not there, or of another project: a caller cannot tell which
  │     ├── FileNotFound
  │     ├── UploadNotFound
  │     ├── JobNotFound
  │     ├── CheckpointNotFound
  │     ├── SweepNotFound
  │     ├── WebhookEndpointNotFound
  │     ├── PermissionNotFound
  │     ├── ProjectNotFound
  │     ├── ApiKeyNotFound
  │     └── ModelNotFound
  ├── Conflict 409                never worth a retry, except RequestInProgress
  │     ├── FileInUse               an unfinished job needs the file
  │     ├── AnswerNotKept           the request was carried out before, and its answer had a secret
  │     └── RequestInProgress       the same request is still being carried out
  ├── IdempotencyKeyReused 422    another request had this Idempotency-Key
  ├── TooLarge 413
  ├── RateLimited 429             the project has more than its share of something
  ├── QuotaExceeded 429           the project has all that it may have; waiting alone does not help
  │     ├── JobQuotaExceeded        jobs in the queue
  │     └── StorageQuotaExceeded    bytes of files, parts of uploads and models
  ├── ClientGone 499              the client closed the connection; nobody reads this answer
  ├── DeadlineExceeded 504        the answer was not complete in the time that the request gave it
  └── Unavailable 503             a part that the request needs does not answer
        ├── EngineUnavailable
        │     └── NoEngine           none is live for the base model
        └── EngineBusy
```
Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class ApiError(Exception):
    """Base of all errors that become an answer.

    Attributes:
        status: HTTP status code.
        type: OpenAI's coarse kind.
        code: stable name for programs.
        param: the parameter at fault, as a path such as ``method.supervised.hyperparameters.n_epochs``.
        should_retry: what to tell the client about sending the same request again; None says nothing.
        retry_after_seconds: when the client may try again; None says nothing.
        more_headers: of the answer.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    should_retry: ClassVar[bool | None] = None
    retry_after_seconds: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.more_headers: dict[str, str] = {}
        if retry_after is not None:
            self.retry_after_seconds = max(1, math.ceil(retry_after))  # the header has whole seconds

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API, all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Response headers, also those that tell clients whether and when to retry."""
        headers = dict(self.more_headers)
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(self.retry_after_seconds)
        return headers


class InvalidRequest(ApiError):
    """A value that cannot be used."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A parameter of OpenAI's that is not offered here. It is refused, since ignoring it would mislead."""

    code = "unsupported_parameter"


class UploadNotPending(InvalidRequest):
    """The upload was completed or cancelled, or has expired."""

    code = "upload_not_pending"


class JobNotCancellable(InvalidRequest):
    """The job has ended."""

    code = "job_not_cancellable"
    should_retry = False


class JobNotPausable(InvalidRequest):
    """The job has ended, or is being cancelled."""

    code = "job_not_pausable"
    should_retry = False


class JobNotResumable(InvalidRequest):
    """The job is not paused, and has not failed with a state to go on from."""

    code = "job_not_resumable"
    should_retry = False


class JobNotDeletable(InvalidRequest):
    """The job has not ended."""

    code = "job_not_deletable"
    should_retry = False


class JobNotRetryable(InvalidRequest):
    """The job has neither failed nor been cancelled."""

    code = "job_not_retryable"
    should_retry = False


class NotPromotable(InvalidRequest):
    """The job has no model that a checkpoint could take the place of, or no checkpoint that would be the best."""

    code = "checkpoint_not_promotable"


class WebhookUnreachable(InvalidRequest):
    """Nothing answered under a webhook endpoint's URL."""

    code = "webhook_unreachable"
    should_retry = False


class NotAuthenticated(ApiError):
    """No key, an unknown one or a revoked one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ProjectMismatch(NotAuthenticated):
    """The key belongs to another project than the ``OpenAI-Project`` header names."""

    code = "mismatched_project"


class PermissionDenied(ApiError):
    """The caller is known but may not do this."""

    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class MissingScope(PermissionDenied):
    """The key does not have the scope that the route needs."""

    code = "missing_scope"


class CsrfTokenInvalid(PermissionDenied):
    """A change came with a browser's session, but without the token that is in its pages."""

    code = "csrf_token_invalid"


class OrganizationKeyRequired(PermissionDenied):
    """The key administers its own project only."""

    code = "organization_key_required"


class NotFound(ApiError):
    """Not there, or not in the caller's project."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class FileNotFound(NotFound):
    """No such file in the caller's project."""

    code = "file_not_found"


class UploadNotFound(NotFound):
    """No such upload in the caller's project."""

    code = "upload_not_found"


class JobNotFound(NotFound):
    """No such fine-tuning job in the caller's project."""

    code = "job_not_found"


class SweepNotFound(NotFound):
    """No such sweep in the caller's project."""

    code = "sweep_not_found"


class WebhookEndpointNotFound(NotFound):
    """No such webhook endpoint in the caller's project."""

    code = "webhook_endpoint_not_found"


class PermissionNotFound(NotFound):
    """No such permission of a model of the caller's project."""

    code = "permission_not_found"


class ProjectNotFound(NotFound):
    """No such project, or not one that the caller administers."""

    code = "project_not_found"


class ApiKeyNotFound(NotFound):
    """No such key, or none that the caller administers."""

    code = "api_key_not_found"


class CheckpointNotFound(NotFound):
    """No such checkpoint of the job."""

    code = "checkpoint_not_found"


class ModelNotFound(NotFound):
    """No such base model, and no such fine-tuned model in the caller's project."""

    code = "model_not_found"


class Conflict(ApiError):
    """The state of a row does not allow this."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"
    should_retry = False  # OpenAI's client repeats every 409 otherwise


class FileInUse(Conflict):
    """An unfinished job needs the file."""

    code = "file_in_use"


class AnswerNotKept(Conflict):
    """The request was carried out before; its answer had a secret, which is not kept."""

    code = "answer_not_kept"


class RequestInProgress(Conflict):
    """The same request is still being carried out."""

    code = "request_in_progress"
    should_retry = True
    retry_after_seconds = 1


class IdempotencyKeyReused(ApiError):
    """Another request had this ``Idempotency-Key``."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"
    should_retry = False


class TooLarge(ApiError):
    """A body or file over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimited(ApiError):
    """The project's own requests are too many."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_seconds = 1


class QuotaExceeded(ApiError):
    """The project has all that it may have of something."""

    status = 429
    type = "rate_limit_error"
    code = "quota_exceeded"
    should_retry = False  # OpenAI's client repeats every 429 otherwise, in seconds


class JobQuotaExceeded(QuotaExceeded):
    """The project may not have more jobs in the queue."""

    code = "job_quota_exceeded"


class StorageQuotaExceeded(QuotaExceeded):
    """The project may not store more bytes."""

    code = "storage_quota_exceeded"


class ClientGone(ApiError):
    """The client closed the connection while its answer was made."""

    status = 499
    type = "invalid_request_error"
    code = "client_closed_request"


class DeadlineExceeded(ApiError):
    """The answer was not complete in the time that the request gave it."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    should_retry = False  # the time is over for the one who asked, too


class Unavailable(ApiError):
    """A part that the request needs does not answer."""

    status = 503
    code = "service_unavailable"
    retry_after_seconds = 1


class EngineUnavailable(Unavailable):
    """The engine does not answer, or broke off."""

    code = "engine_unavailable"


class NoEngine(EngineUnavailable):
    """No engine that is live serves the base model."""

    code = "no_engine"


class EngineBusy(Unavailable):
    """Too many requests wait for one of the engine's rows."""

    code = "engine_busy"
