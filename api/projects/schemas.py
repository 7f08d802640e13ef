"""Projects and keys on the wire, as ``client.admin.organization`` of OpenAI's client reads them, and their scopes."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.pagination import Shown
from api.projects.models import ApiKey, Project
from api.scopes import MEMBER_SCOPES, Scope, split_scopes

Name = Annotated[str, Field(min_length=1, max_length=256)]
Scopes = Annotated[set[Scope], Field(min_length=1)]
Lifetime = Annotated[int, Field(ge=1, le=10 * 366 * 86_400)]
#: How long a secret may still be used after a rotation.
MAX_GRACE_SECONDS = 30 * 86_400


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProjectCreate(_Body):
    """A new project."""

    name: Name
    #: Ours: the organisation part of its models' names; made of the name if it is left out.
    slug: str | None = None


class ProjectUpdate(_Body):
    """A new name of a project. Its slug stays: the names of its models have it."""

    name: Name


class AdminKeyCreate(_Body):
    """A new organization-wide key."""

    name: Name
    expires_in_seconds: Lifetime | None = None

    @property
    def lifetime(self) -> timedelta | None:
        """How long the key lives; None is for good."""
        return None if self.expires_in_seconds is None else timedelta(seconds=self.expires_in_seconds)


class ApiKeyCreate(AdminKeyCreate):
    """A new key of a project."""

    scopes: Scopes = Field(default_factory=lambda: set(MEMBER_SCOPES))


class ApiKeyUpdate(_Body):
    """What changes of a key; the rest stays."""

    name: Name | None = None
    scopes: Scopes | None = None
    expires_in_seconds: Lifetime | None = None

    @model_validator(mode="after")
    def _change_something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("at least one of name, scopes and expires_in_seconds")
        return self


class ApiKeyRotate(_Body):
    """How to change a key's secret."""

    grace_seconds: int = Field(default=0, ge=0, le=MAX_GRACE_SECONDS)


class ProjectObject(Shown):
    """OpenAI's project."""

    id: str
    object: Literal["organization.project"] = "organization.project"
    name: str
    slug: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]

    @classmethod
    def of(cls, project: Project) -> Self:
        """Show a row."""
        return cls(
            id=project.id,
            name=project.name,
            slug=project.slug,
            created_at=int(project.created_at.timestamp()),
            archived_at=_seconds(project.archived_at),
            status="active" if project.archived_at is None else "archived",
        )


class _Key(Shown):
    """What keys of both kinds show."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    #: The beginning of the secret.
    redacted_value: str
    #: Until when the secret before the last rotation can be used.
    previous_value_expires_at: int | None
    owner: dict[str, Any]

    @classmethod
    def of(cls, key: ApiKey, **more: Any) -> Self:
        """Show a row, and ``value`` if its secret is new."""
        return cls(
            id=key.id,
            name=key.name,
            scopes=sorted(split_scopes(key.scopes)),
            created_at=int(key.created_at.timestamp()),
            last_used_at=_seconds(key.last_used_at),
            expires_at=_seconds(key.expires_at),
            redacted_value=f"{key.prefix}...",
            previous_value_expires_at=_seconds(key.previous_until),
            owner=cls.owner_of(key),
            **more,
        )

    @staticmethod
    def owner_of(key: ApiKey) -> dict[str, Any]:
        """OpenAI's owner. There are no accounts here, so a key is its own."""
        raise NotImplementedError


class ProjectApiKey(_Key):
    """OpenAI's key of a project, and its scopes."""

    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    owner_project_access: Literal["active"] = "active"

    @staticmethod
    def owner_of(key: ApiKey) -> dict[str, Any]:
        """A service account of the key's name."""
        role = "owner" if Scope.ADMIN in split_scopes(key.scopes) else "member"
        account = {"id": key.id, "name": key.name, "created_at": int(key.created_at.timestamp()), "role": role}
        return {"type": "service_account", "service_account": account}


class NewProjectApiKey(ProjectApiKey):
    """The only answer with the secret."""

    value: str


class AdminApiKey(_Key):
    """OpenAI's organization-wide key."""

    object: Literal["organization.admin_api_key"] = "organization.admin_api_key"

    @staticmethod
    def owner_of(key: ApiKey) -> dict[str, Any]:
        """A user of the key's name."""
        return {
            "type": "user",
            "object": "organization.user",
            "id": key.id,
            "name": key.name,
            "created_at": int(key.created_at.timestamp()),
            "role": "owner",
        }


class NewAdminApiKey(AdminApiKey):
    """The only answer with the secret."""

    value: str


class ProjectApiKeyDeleted(BaseModel):
    """Answer to the revocation of a project's key."""

    id: str
    object: Literal["organization.project.api_key.deleted"] = "organization.project.api_key.deleted"
    deleted: Literal[True] = True


class AdminApiKeyDeleted(BaseModel):
    """Answer to the revocation of an organization-wide key."""

    id: str
    object: Literal["organization.admin_api_key.deleted"] = "organization.admin_api_key.deleted"
    deleted: Literal[True] = True


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
