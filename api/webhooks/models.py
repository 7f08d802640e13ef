"""Endpoints that are told of events, and the outbox: a delivery is a row, written with the event itself."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, JsonColumn, Listed
from api.jobs.models import JobStatus


class EventType(StrEnum):
    """OpenAI's events of fine-tuning jobs."""

    SUCCEEDED = "fine_tuning.job.succeeded"
    FAILED = "fine_tuning.job.failed"
    CANCELLED = "fine_tuning.job.cancelled"


#: The event of each way in which a job can end.
EVENT_OF_END: dict[JobStatus, EventType] = {
    JobStatus.SUCCEEDED: EventType.SUCCEEDED,
    JobStatus.FAILED: EventType.FAILED,
    JobStatus.CANCELLED: EventType.CANCELLED,
}


class DeliveryStatus(StrEnum):
    """``failed`` is given up: nobody tries it again."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class WebhookEndpoint(Base, Listed):
    """A URL of a project's that is told of events. The secret is kept as it is: it signs."""

    __tablename__ = "webhook_endpoints"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(JsonColumn)
    secret: Mapped[str]
    #: The secret before the last rotation, which signs too until ``old_secret_until``.
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[datetime | None]
    #: Last change of what its user sets.
    updated_at: Mapped[datetime]
    #: First failure since the last success; None if the last attempt succeeded.
    failing_since: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]


class WebhookDelivery(Base, Listed):
    """One event for one endpoint; ``id`` is the ``webhook-id`` of all its attempts."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index(None, "status", "next_attempt_at"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), index=True)
    #: The same for all endpoints that are told of the event.
    event_id: Mapped[str]
    event_type: Mapped[str]
    job_id: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(default=DeliveryStatus.PENDING)
    #: Attempts begun; the number of the latest is the fencing number of its result.
    attempts: Mapped[int] = mapped_column(default=0)
    #: When it may be tried next; while an attempt is under way, when it counts as lost.
    next_attempt_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]


class WebhookAttempt(Base, Listed):
    """What came of one attempt: a status code, or an error where there was no answer."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), index=True)
    number: Mapped[int]
    status_code: Mapped[int | None]
    error: Mapped[str | None]
    milliseconds: Mapped[int]
