"""Quotas on the wire: ours, and those of them that ``client.admin.organization.projects.rate_limits`` knows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.pagination import Shown
from api.projects.models import Project
from api.quotas.models import QUOTAS, Quotas

#: 0 is no limit.
Limit = Annotated[int, Field(ge=0, lt=2**63)]


class QuotasUpdate(BaseModel):
    """What changes; null goes back to the settings' value."""

    model_config = ConfigDict(extra="forbid")

    jobs_running: Limit | None = None
    jobs_queued: Limit | None = None
    bytes_stored: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None

    @model_validator(mode="after")
    def _change_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"at least one of {', '.join(QUOTAS)}")
        return self


class ProjectQuotas(Shown):
    """What a project may have; 0 is no limit. ``id`` is the project's."""

    object: Literal["organization.project.quotas"] = "organization.project.quotas"
    jobs_running: int
    jobs_queued: int
    bytes_stored: int
    requests_per_minute: int
    tokens_per_minute: int
    #: Names of those that are the project's own; the others are the settings'.
    own: list[str]

    @classmethod
    def of(cls, project: Project, quotas: Quotas) -> Self:
        """Show a row."""
        own = [name for name in QUOTAS if getattr(project, name) is not None]
        return cls(id=project.id, own=own, **{name: getattr(quotas, name) for name in QUOTAS})


class QuotaUse(BaseModel):
    """One quota and what is used of it."""

    name: str
    #: 0 is no limit.
    limit: int
    #: None where it is not counted, since there is no limit, or cannot be found out now.
    used: int | None
    #: Seconds until a minute's count begins anew; None where nothing begins anew.
    resets_in: float | None = None


class QuotaUses(BaseModel):
    """All quotas of a project."""

    object: Literal["list"] = "list"
    data: list[QuotaUse]


class RateLimit(Shown):
    """OpenAI's rate limit. There is one of a project, for all models together; 0 is no limit."""

    id: Literal["rl-all-models"] = "rl-all-models"
    object: Literal["project.rate_limit"] = "project.rate_limit"
    model: Literal["*"] = "*"
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int

    @classmethod
    def of(cls, quotas: Quotas) -> Self:
        """Show what holds for a project."""
        return cls(
            max_requests_per_1_minute=quotas.requests_per_minute, max_tokens_per_1_minute=quotas.tokens_per_minute
        )


class RateLimitUpdate(BaseModel):
    """What changes of it."""

    model_config = ConfigDict(extra="forbid")

    max_requests_per_1_minute: Limit | None = None
    max_tokens_per_1_minute: Limit | None = None

    @model_validator(mode="after")
    def _change_something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("at least one of max_requests_per_1_minute and max_tokens_per_1_minute")
        return self

    def quotas(self) -> QuotasUpdate:
        """The same in our words."""
        values = {
            "requests_per_minute": self.max_requests_per_1_minute,
            "tokens_per_minute": self.max_tokens_per_1_minute,
        }
        return QuotasUpdate(**{name: value for name, value in values.items() if value is not None})
