"""Models on the wire."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel

from api.models.models import Adapter
from api.pagination import Shown


class Model(Shown):
    """OpenAI's model, with vLLM's ``root``, the base model, and ``parent``: what its training started from.

    The parent may have been deleted since. Base models have no row, hence neither ``task``, ``digest`` nor ``bytes``.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    #: ``uora.spec.Task`` that it was trained for, hence how it is asked; None for a base model.
    task: str | None
    #: Of the adapter as it is stored and served; another one once a checkpoint was promoted.
    digest: str | None
    #: Size of the adapter as it is stored.
    bytes: int | None

    @classmethod
    def of(cls, adapter: Adapter, *, owner: str) -> Self:
        """Show a fine-tuned model."""
        return cls(
            id=adapter.id,
            created=int(adapter.created_at.timestamp()),
            owned_by=owner,
            root=adapter.base_model,
            parent=adapter.parent or adapter.base_model,
            task=adapter.task,
            digest=adapter.digest,
            bytes=adapter.artifact_bytes,
        )

    @classmethod
    def base(cls, name: str) -> Self:
        """Show a base model. It has no row, so no time of creation."""
        return cls(id=name, created=0, owned_by="system", root=name, parent=None, task=None, digest=None, bytes=None)


class ModelDeleted(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True
