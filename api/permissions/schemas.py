"""Permissions of models on the wire."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from api.pagination import Shown
from api.permissions.models import ModelPermission


class PermissionCreate(BaseModel):
    """Who may use the model."""

    model_config = ConfigDict(extra="forbid")

    project_ids: Annotated[list[str], Field(min_length=1, max_length=100)]


class Permission(Shown):
    """OpenAI's permission; ``project_id`` is the project that has it."""

    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str

    @classmethod
    def of(cls, permission: ModelPermission) -> Self:
        """Show a row."""
        return cls(
            id=permission.id, created_at=int(permission.created_at.timestamp()), project_id=permission.shared_with
        )


class PermissionDeleted(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    deleted: bool = True


class PermissionOrder(StrEnum):
    """By age, in the words of this list alone."""

    ASCENDING = "ascending"
    DESCENDING = "descending"
