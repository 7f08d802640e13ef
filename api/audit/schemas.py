"""The audit log on the wire, as ``client.admin.organization.audit_logs`` reads it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict

from api.audit.models import AuditLog
from api.pagination import Shown


class AuditLogObject(Shown):
    """OpenAI's audit log entry. The key named like its ``type`` has the details."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["organization.audit_log"] = "organization.audit_log"
    type: str
    effective_at: int
    actor: dict[str, Any]
    project: dict[str, Any]
    request_id: str
    ip_address: str | None

    @classmethod
    def of(cls, entry: AuditLog) -> Self:
        """Show a row."""
        return cls(
            id=entry.id,
            type=entry.action,
            effective_at=int(entry.created_at.timestamp()),
            actor={"type": "api_key", "api_key": {"type": "service_account", "id": entry.key_id}},
            project={"id": entry.project_id},
            request_id=entry.request_id,
            ip_address=entry.ip_address,
            **{entry.action: {"id": entry.object_id, **(entry.details or {})}},
        )
