"""Usage on the wire: OpenAI's buckets, for completions as its client reads them, and ours with all that is counted."""

from __future__ import annotations

from enum import StrEnum
from typing import Generic, Literal, Self, TypeVar

from pydantic import BaseModel

from api.usage.repository import StoredBytes, Total

R = TypeVar("R", bound=BaseModel)


class Width(StrEnum):
    """Of a bucket; they begin with the minute, hour or day of UTC."""

    MINUTE = "1m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def seconds(self) -> int:
        """How long it is."""
        return {Width.MINUTE: 60, Width.HOUR: 3600, Width.DAY: 86_400}[self]

    @property
    def default_limit(self) -> int:
        """Buckets of a page, unless told otherwise."""
        return {Width.MINUTE: 60, Width.HOUR: 24, Width.DAY: 7}[self]

    @property
    def max_limit(self) -> int:
        """Buckets of a page at most."""
        return {Width.MINUTE: 1440, Width.HOUR: 168, Width.DAY: 31}[self]


class CompletionsGroup(StrEnum):
    """What completions can be told apart by."""

    PROJECT = "project_id"
    KEY = "api_key_id"
    MODEL = "model"


class UsageGroup(StrEnum):
    """What a project's usage can be told apart by."""

    OPERATION = "operation"
    KEY = "api_key_id"
    MODEL = "model"
    JOB = "job_id"


class CompletionsResult(BaseModel):
    """Chat and other completions of a bucket, as OpenAI counts them; what was not asked for apart is null."""

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    num_model_requests: int
    input_tokens: int
    output_tokens: int
    input_cached_tokens: Literal[0] = 0
    input_audio_tokens: Literal[0] = 0
    output_audio_tokens: Literal[0] = 0
    project_id: str | None
    user_id: None = None
    api_key_id: str | None
    model: str | None
    batch: None = None
    service_tier: None = None

    @classmethod
    def of(cls, total: Total) -> Self:
        """Show a sum."""
        return cls(
            num_model_requests=total.amounts.requests,
            input_tokens=total.amounts.input_tokens,
            output_tokens=total.amounts.output_tokens,
            project_id=total.by.get("project_id"),
            api_key_id=total.by.get("key_id") or None,
            model=total.by.get("model"),
        )


class UsageResult(BaseModel):
    """All that was used in a bucket; what was not asked for apart is null."""

    object: Literal["usage.result"] = "usage.result"
    operation: str | None
    api_key_id: str | None
    model: str | None
    job_id: str | None
    requests: int
    #: Of prompts and classified items.
    input_tokens: int
    output_tokens: int
    trained_tokens: int
    items: int
    #: Of training.
    seconds: float

    @classmethod
    def of(cls, total: Total) -> Self:
        """Show a sum."""
        amounts = total.amounts
        return cls(
            operation=total.by.get("operation"),
            api_key_id=total.by.get("key_id") or None,
            model=total.by.get("model"),
            job_id=total.by.get("job_id") or None,
            requests=amounts.requests,
            input_tokens=amounts.input_tokens,
            output_tokens=amounts.output_tokens,
            trained_tokens=amounts.trained_tokens,
            items=amounts.items,
            seconds=round(amounts.seconds, 3),
        )


class Bucket(BaseModel, Generic[R]):
    """From ``start_time`` on until ``end_time``, in Unix seconds."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    #: None where nothing was used.
    results: list[R]


class BucketPage(BaseModel, Generic[R]):
    """OpenAI's page of buckets, the oldest first; ``next_page`` is the ``page`` to ask for then."""

    object: Literal["page"] = "page"
    data: list[Bucket[R]]
    has_more: bool
    next_page: str | None


class BytesStored(BaseModel):
    """What the project has stored now."""

    files: int
    uploads: int
    models: int
    total: int

    @classmethod
    def of(cls, stored: StoredBytes) -> Self:
        """Show what was found."""
        return cls(files=stored.files, uploads=stored.uploads, models=stored.models, total=stored.total)


class UsagePage(BucketPage[UsageResult]):
    """What a project has used, and what it has stored now."""

    bytes_stored: BytesStored
