"""The audit log."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Listed


class AuditLog(Base, Listed):
    """One change that a request made, written in its transaction. It refers to nothing, so it outlives everything."""

    __tablename__ = "audit_logs"

    #: ``api.routing.Operation.action``.
    action: Mapped[str]
    object_id: Mapped[str | None] = mapped_column(index=True)
    key_id: Mapped[str]
    #: The project that the change is about.
    project_id: Mapped[str] = mapped_column(index=True)
    request_id: Mapped[str]
    ip_address: Mapped[str | None]
    details: Mapped[dict[str, Any] | None]
