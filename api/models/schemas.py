"""Models on the wire."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel

from api.models.models import Adapter
from api.pagination import Shown


class Model(Shown):
    """OpenAI's model, with vLLM's ``root``, the base model, and ``parent``: what its training started from.

    The parent may have been deleted since.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None

    @classmethod
    def of(cls, adapter: Adapter, *, owner: str) -> Self:
        """Show a fine-tuned model."""
        return cls(
            id=adapter.id,
            created=int(adapter.created_at.timestamp()),
            owned_by=owner,
            root=adapter.base_model,
            parent=adapter.parent or adapter.base_model,
        )

    @classmethod
    def base(cls, name: str) -> Self:
        """Show a base model. It has no row, so no time of creation."""
        return cls(id=name, created=0, owned_by="system", root=name, parent=None)


class ModelDeleted(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True
