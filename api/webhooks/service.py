"""What can be done with webhook endpoints, and what is sent to them."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from api.caller import Caller
from api.database import database_now, new_id, now
from api.errors import InvalidRequest, WebhookUnreachable
from api.pagination import Page, PageQuery
from api.queue import TaskName
from api.unit_of_work import UnitOfWork
from api.webhooks import repository
from api.webhooks.models import DeliveryStatus, EventType, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from api.webhooks.repository import ClaimedDelivery, EndpointRepository
from api.webhooks.schemas import EndpointCreate, EndpointUpdate
from api.webhooks.sending import Message, Sent, check_url, new_secret, send

MAX_ENDPOINTS = 20
#: How long an old secret signs beside the new one, if that is asked for.
OLD_SECRET_FOR = timedelta(hours=24)
#: Between two attempts: the first time, twice as long each time, at most.
FIRST_DELAY = timedelta(seconds=10)
LONGEST_DELAY = timedelta(hours=4)
#: After so long without a success a delivery is given up, and an endpoint disabled.
PATIENCE = timedelta(days=3)
#: Deliveries of one job's end at most: its project has no more endpoints.
_RINGS = MAX_ENDPOINTS


def create(session: Session, caller: Caller, *, body: EndpointCreate, allow_private: bool) -> WebhookEndpoint:
    """Add an endpoint; raises ``InvalidRequest`` for a URL that cannot be used, or one endpoint too many."""
    check_url(body.url, allow_private=allow_private)
    endpoints = EndpointRepository(session, caller.project_id)
    if endpoints.count() >= MAX_ENDPOINTS:
        raise InvalidRequest(
            f"The project has {MAX_ENDPOINTS} webhook endpoints, the most there may be; delete one.",
            code="too_many_webhook_endpoints",
        )
    moment = now()
    return endpoints.add(
        WebhookEndpoint(
            id=new_id("whe_"),
            project_id=caller.project_id,
            created_at=moment,
            updated_at=moment,
            name=body.name,
            url=body.url,
            event_types=list(body.event_types),
            secret=new_secret(),
        )
    )


def list_endpoints(session: Session, caller: Caller, *, query: PageQuery) -> Page[WebhookEndpoint]:
    """A page of the project's endpoints."""
    return EndpointRepository(session, caller.project_id).page(query)


def get(session: Session, caller: Caller, endpoint_id: str) -> WebhookEndpoint:
    """One endpoint; raises ``WebhookEndpointNotFound``."""
    return EndpointRepository(session, caller.project_id).get(endpoint_id)


def update(
    session: Session, caller: Caller, endpoint_id: str, *, body: EndpointUpdate, allow_private: bool
) -> WebhookEndpoint:
    """Change an endpoint; another URL is another chance for one that was disabled.

    Raises:
        WebhookEndpointNotFound: there is none in the project.
        InvalidRequest: a URL that cannot be used.
    """
    endpoint = EndpointRepository(session, caller.project_id).lock(endpoint_id)
    before = (endpoint.name, endpoint.url, endpoint.event_types, endpoint.disabled_at)
    if body.url is not None and body.url != endpoint.url:
        check_url(body.url, allow_private=allow_private)
        endpoint.url = body.url
        _enable(endpoint)
    if body.name is not None:
        endpoint.name = body.name
    if body.event_types is not None:
        endpoint.event_types = list(body.event_types)
    if body.enabled is True:
        _enable(endpoint)
    if body.enabled is False and endpoint.disabled_at is None:
        _disable(session, endpoint, at=now(), reason="Disabled by its user.")
    if before != (endpoint.name, endpoint.url, endpoint.event_types, endpoint.disabled_at):
        endpoint.updated_at = now()
    return endpoint


def delete(session: Session, caller: Caller, endpoint_id: str) -> None:
    """Delete an endpoint with its deliveries; raises ``WebhookEndpointNotFound``."""
    endpoints = EndpointRepository(session, caller.project_id)
    endpoints.delete(endpoints.lock(endpoint_id))


def rotate_secret(session: Session, caller: Caller, endpoint_id: str, *, keep_old: bool) -> WebhookEndpoint:
    """Give an endpoint a new secret; the old one signs beside it for a day if it is kept.

    Raises:
        WebhookEndpointNotFound: there is none in the project.
    """
    endpoint = EndpointRepository(session, caller.project_id).lock(endpoint_id)
    moment = now()
    endpoint.old_secret = endpoint.secret if keep_old else None
    endpoint.old_secret_until = moment + OLD_SECRET_FOR if keep_old else None
    endpoint.secret = new_secret()
    endpoint.updated_at = moment
    return endpoint


def list_deliveries(
    session: Session, caller: Caller, endpoint_id: str, *, query: PageQuery
) -> tuple[Page[WebhookDelivery], dict[str, list[WebhookAttempt]]]:
    """A page of an endpoint's deliveries, and their attempts; raises ``WebhookEndpointNotFound``."""
    endpoints = EndpointRepository(session, caller.project_id)
    page = endpoints.deliveries(endpoints.get(endpoint_id), query)
    return page, endpoints.attempts(page.rows)


async def send_sample(endpoint: WebhookEndpoint, event_type: EventType, *, allow_private: bool) -> int:
    """Send an event of a job that does not exist, once, and return the status code.

    Raises:
        WebhookUnreachable: there was no answer.
    """
    body = _body(new_id("evt_"), event_type, job_id="ftjob-sample", at=now())
    message = Message(new_id("wh_"), endpoint.url, body, _secrets(endpoint, at=now()))
    sent = await send(message, allow_private=allow_private)
    if sent.status_code is None:
        raise WebhookUnreachable(f"Nothing answered under {endpoint.url}: {sent.error}", param="url")
    return sent.status_code


def ring(work: UnitOfWork, job_id: str) -> None:
    """Have the deliveries of a job that just ended made after the commit."""
    work.session.flush()
    for delivery_id in repository.due(work.session, limit=_RINGS, job_id=job_id):
        work.ring(TaskName.DELIVER, delivery_id)


def message_of(claimed: ClaimedDelivery, *, at: datetime) -> Message:
    """What is sent in this attempt, and in every other."""
    delivery = claimed.delivery
    body = _body(delivery.event_id, delivery.event_type, job_id=delivery.job_id, at=delivery.created_at)
    return Message(delivery.id, claimed.endpoint.url, body, _secrets(claimed.endpoint, at=at))


def record(session: Session, claimed: ClaimedDelivery, sent: Sent) -> None:
    """Write down what came of an attempt, and what follows; nothing if another attempt has begun since."""
    held = repository.lock_claimed(session, claimed)
    if held is None:
        return
    repository.add_attempt(
        session, claimed, status_code=sent.status_code, error=sent.error, milliseconds=sent.milliseconds
    )
    delivery, endpoint = held
    moment = database_now(session)
    if sent.delivered:
        delivery.status, delivery.delivered_at, delivery.next_attempt_at = DeliveryStatus.DELIVERED, moment, None
        endpoint.failing_since = None
        return
    delivery.next_attempt_at = moment + delay_after(claimed.attempt)
    if moment - delivery.created_at >= PATIENCE:
        delivery.status, delivery.next_attempt_at = DeliveryStatus.FAILED, None
    endpoint.failing_since = endpoint.failing_since or moment
    if moment - endpoint.failing_since >= PATIENCE and endpoint.disabled_at is None:
        found = sent.error or f"status {sent.status_code}"
        since = f"{endpoint.failing_since:%Y-%m-%d %H:%M} UTC"
        _disable(session, endpoint, at=moment, reason=f"Every attempt since {since} failed; the last one with: {found}")


def delay_after(attempt: int) -> timedelta:
    """Until the next attempt, up to a fifth longer, so that endpoints that failed together are not tried together."""
    delay = LONGEST_DELAY
    if attempt < 16:  # larger powers do not matter, and would not fit
        delay = min(FIRST_DELAY * 2 ** (attempt - 1), LONGEST_DELAY)
    return delay * (1 + random.random() / 5)  # noqa: S311 # spreads attempts, protects nothing


def _enable(endpoint: WebhookEndpoint) -> None:
    endpoint.disabled_at = endpoint.disabled_reason = endpoint.failing_since = None


def _disable(session: Session, endpoint: WebhookEndpoint, *, at: datetime, reason: str) -> None:
    endpoint.disabled_at, endpoint.disabled_reason = at, reason
    session.flush()
    repository.give_up_pending(session, endpoint.id)


def _secrets(endpoint: WebhookEndpoint, *, at: datetime) -> list[str]:
    kept = endpoint.old_secret_until is not None and at < endpoint.old_secret_until
    return [endpoint.secret, endpoint.old_secret] if kept and endpoint.old_secret else [endpoint.secret]


def _body(event_id: str, event_type: str, *, job_id: str, at: datetime) -> bytes:
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(at.timestamp()),
        "type": event_type,
        "data": {"id": job_id},
    }
    return json.dumps(event, separators=(",", ":")).encode()
