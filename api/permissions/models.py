"""Models that a project lets others use."""

from __future__ import annotations

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class ModelPermission(Base, Listed):
    """Another project may ask a model of ``project_id``'s. It goes with the model."""

    __tablename__ = "model_permissions"
    __table_args__ = (UniqueConstraint("model", "shared_with"),)

    #: Whose the model is.
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    model: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), index=True)
    shared_with: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
