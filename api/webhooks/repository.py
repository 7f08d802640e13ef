"""Queries of webhooks: those of a project, and the outbox, which the worker empties for all projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Select, func, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.orm import Session

from api.database import database_now, new_id
from api.errors import WebhookEndpointNotFound
from api.jobs.models import Job, JobStatus
from api.pagination import Page, PageQuery, paginate
from api.repository import R, Repository
from api.webhooks.models import EVENT_OF_END, DeliveryStatus, WebhookAttempt, WebhookDelivery, WebhookEndpoint


class EndpointRepository(Repository[WebhookEndpoint]):
    """Webhook endpoints of one project, with their deliveries."""

    model = WebhookEndpoint
    missing = WebhookEndpointNotFound
    noun = "webhook endpoint"

    def lock(self, endpoint_id: str) -> WebhookEndpoint:
        """The row, locked until the transaction ends; raises ``WebhookEndpointNotFound``."""
        endpoint = self.session.scalar(
            self.visible().where(WebhookEndpoint.id == endpoint_id).with_for_update(key_share=True)
        )
        return endpoint or self.get(endpoint_id)

    def count(self) -> int:
        """How many the project has."""
        return self.session.scalar(self.visible().with_only_columns(func.count())) or 0

    def delete(self, endpoint: WebhookEndpoint) -> None:
        """Delete it with its deliveries."""
        self.session.delete(endpoint)

    def deliveries(self, endpoint: WebhookEndpoint, query: PageQuery) -> Page[WebhookDelivery]:
        """A page of what was sent to the endpoint, or is to be."""
        of_endpoint = select(WebhookDelivery).where(
            WebhookDelivery.project_id == self.project_id, WebhookDelivery.endpoint_id == endpoint.id
        )
        return paginate(self.session, of_endpoint, model=WebhookDelivery, query=query)

    def attempts(self, deliveries: Sequence[WebhookDelivery]) -> dict[str, list[WebhookAttempt]]:
        """Their attempts by the id of the delivery, oldest first."""
        found: dict[str, list[WebhookAttempt]] = {delivery.id: [] for delivery in deliveries}
        wanted = select(WebhookAttempt).where(WebhookAttempt.delivery_id.in_(list(found)))
        for attempt in self.session.scalars(wanted.order_by(WebhookAttempt.seq)):
            found[attempt.delivery_id].append(attempt)
        return found


def record_end(session: Session, job_id: str, status: JobStatus) -> None:
    """Write a delivery for each endpoint that is to be told that the job has ended: in the transaction that ends it."""
    event_type = EVENT_OF_END[status]
    endpoints = session.scalars(
        select(WebhookEndpoint)
        .join(Job, Job.project_id == WebhookEndpoint.project_id)
        .where(Job.id == job_id, WebhookEndpoint.disabled_at.is_(None))
        # None is deleted before the commit: a delivery without its endpoint would undo the job's end.
        .with_for_update(read=True, key_share=True, of=WebhookEndpoint)
    ).all()
    event_id, moment = new_id("evt_"), database_now(session)
    session.add_all(
        WebhookDelivery(
            id=new_id("wh_"),
            created_at=moment,
            project_id=endpoint.project_id,
            endpoint_id=endpoint.id,
            event_id=event_id,
            event_type=event_type,
            job_id=job_id,
            next_attempt_at=moment,
        )
        for endpoint in endpoints
        if event_type in endpoint.event_types
    )


def due(session: Session, *, limit: int, job_id: str | None = None) -> list[str]:
    """Ids of deliveries that may be tried now, the longest due first; of one job, or of all."""
    wanted = select(WebhookDelivery.id).where(
        WebhookDelivery.status == DeliveryStatus.PENDING,
        WebhookDelivery.next_attempt_at <= database_now(session),
    )
    if job_id is not None:
        wanted = wanted.where(WebhookDelivery.job_id == job_id)
    return list(session.scalars(wanted.order_by(WebhookDelivery.next_attempt_at).limit(limit)))


@dataclass(frozen=True)
class ClaimedDelivery:
    """A delivery that this process may try now; only the newest ``attempt`` can record what came of it."""

    delivery: WebhookDelivery
    endpoint: WebhookEndpoint
    attempt: int


def claim(session: Session, delivery_id: str, *, hold: timedelta) -> ClaimedDelivery | None:
    """Begin an attempt; of several claimers one succeeds.

    Args:
        session: of a transaction that ends before anything is sent.
        delivery_id: which.
        hold: after this, an attempt of which nothing was heard counts as lost, and the next may begin.

    Returns:
        None if it is not due, or its endpoint was disabled.
    """
    moment = database_now(session)
    taken = session.scalar(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == delivery_id,
            WebhookDelivery.status == DeliveryStatus.PENDING,
            WebhookDelivery.next_attempt_at <= moment,
        )
        .values(attempts=WebhookDelivery.attempts + 1, next_attempt_at=moment + hold)
        .returning(WebhookDelivery.attempts)
        .execution_options(synchronize_session=False)
    )
    if taken is None:
        return None
    delivery, endpoint = session.execute(_with_endpoint(delivery_id)).one()
    if endpoint.disabled_at is not None:  # between the event's look and its commit
        delivery.status, delivery.next_attempt_at = DeliveryStatus.FAILED, None
        return None
    return ClaimedDelivery(delivery=delivery, endpoint=endpoint, attempt=taken)


def lock_claimed(session: Session, claimed: ClaimedDelivery) -> tuple[WebhookDelivery, WebhookEndpoint] | None:
    """The rows, locked, if the attempt is still the newest and both are there."""
    # The endpoint first, as everybody does who changes both.
    endpoint = session.scalar(_locked(WebhookEndpoint, claimed.endpoint.id))
    delivery = session.scalar(_locked(WebhookDelivery, claimed.delivery.id))
    if endpoint is None or delivery is None:
        return None
    newest = delivery.attempts == claimed.attempt and delivery.status == DeliveryStatus.PENDING
    return (delivery, endpoint) if newest else None


def add_attempt(
    session: Session, claimed: ClaimedDelivery, *, status_code: int | None, error: str | None, milliseconds: int
) -> None:
    """Append to the delivery's log."""
    session.add(
        WebhookAttempt(
            id=new_id("whatt_"),
            delivery_id=claimed.delivery.id,
            number=claimed.attempt,
            status_code=status_code,
            error=error,
            milliseconds=milliseconds,
        )
    )


def give_up_pending(session: Session, endpoint_id: str) -> None:
    """Try nothing more for an endpoint."""
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.status == DeliveryStatus.PENDING)
        .values(status=DeliveryStatus.FAILED, next_attempt_at=None)
    )


def forget(session: Session, *, before: datetime) -> None:
    """Delete the log of deliveries that have come to an end and are older."""
    session.execute(
        delete_rows(WebhookDelivery).where(
            WebhookDelivery.status != DeliveryStatus.PENDING, WebhookDelivery.created_at < before
        )
    )


def _with_endpoint(delivery_id: str) -> Select[WebhookDelivery, WebhookEndpoint]:
    return (
        select(WebhookDelivery, WebhookEndpoint)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(WebhookDelivery.id == delivery_id)
        .execution_options(populate_existing=True)
    )


def _locked(model: type[R], row_id: str) -> Select[R]:
    statement = select(model).where(model.id == row_id).with_for_update(key_share=True)
    return statement.execution_options(populate_existing=True)
