"""Fine-tuned models. A model is this row: its vectors, and the manifest that rebuilds the rest from seeds."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class Adapter(Base, Listed):
    """A servable adapter; ``id`` is the model name clients use (``ft:<base>:<org>:<suffix>:<id>``)."""

    __tablename__ = "adapters"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    base_model: Mapped[str] = mapped_column(index=True)
    #: Optimizer step of a checkpoint; None for a job's final model. Only final models are listed.
    checkpoint_step: Mapped[int | None]
    #: The fine-tuned model that its training started from, there or not; None if that was the base model.
    parent: Mapped[str | None]
    #: Digest of the artifact (``uora.artifact``), checked wherever the bytes are used.
    digest: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    #: The whole artifact: safetensors with the manifest in its header.
    artifact: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
