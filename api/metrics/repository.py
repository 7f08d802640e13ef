"""Queries of metrics. They serve the operator, so these functions take no project id; each has an index."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.engines.models import EngineReplica
from api.jobs.models import Job, JobStatus
from api.webhooks.models import DeliveryStatus, WebhookDelivery


def count_jobs(session: Session, statuses: Collection[JobStatus]) -> dict[JobStatus, int]:
    """How many jobs there are of each of the statuses. It takes as long as there are many."""
    wanted = select(Job.status, func.count()).where(Job.status.in_(list(statuses))).group_by(Job.status)
    counts = {row[0]: row[1] for row in session.execute(wanted)}
    return {status: counts.get(status, 0) for status in statuses}


def oldest_job(session: Session, status: JobStatus) -> datetime | None:
    """When the first of the jobs with the status was created."""
    return session.scalar(select(Job.created_at).where(Job.status == status).order_by(Job.seq).limit(1))


def count_abandoned(session: Session, moment: datetime) -> int:
    """Running jobs whose lease has run out."""
    abandoned = select(func.count()).where(Job.status == JobStatus.RUNNING, Job.lease_until < moment)
    return session.scalar(abandoned) or 0


def count_engines(session: Session, moment: datetime, *, ttl: timedelta) -> dict[str, int]:
    """Live engines by base model, 0 for one that has dead ones only; the table has a row for each engine."""
    engines = session.execute(select(EngineReplica.base_model, EngineReplica.heartbeat_at)).all()
    counts = dict.fromkeys((base_model for base_model, _ in engines), 0)
    for base_model, heartbeat_at in engines:
        counts[base_model] += heartbeat_at > moment - ttl
    return counts


def pending_deliveries(session: Session) -> tuple[int, datetime | None]:
    """How many webhooks wait, and when the first of them was due, or is."""
    pending = select(func.count(), func.min(WebhookDelivery.next_attempt_at)).where(
        WebhookDelivery.status == DeliveryStatus.PENDING
    )
    count, first = session.execute(pending).one()
    return count, first
