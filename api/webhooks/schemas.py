"""Webhooks on the wire, as OpenAI's client has them; keys of ours are marked."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from api.pagination import Shown
from api.webhooks.models import EventType, WebhookAttempt, WebhookDelivery, WebhookEndpoint


def _once(event_types: list[EventType]) -> list[EventType]:
    return list(dict.fromkeys(event_types))


EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=100), AfterValidator(_once)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EndpointCreate(_Request):
    """Body of a new endpoint."""

    name: Name
    url: str
    event_types: EventTypes


class EndpointUpdate(_Request):
    """What is to change; None is left as it is."""

    name: Name | None = None
    url: str | None = None
    event_types: EventTypes | None = None
    #: Ours: true sends to a disabled endpoint again, false sends nothing more.
    enabled: bool | None = None


class SecretRotate(_Request):
    """How the old secret ends."""

    keep_old_secret_active_for_24_hours: bool = False


class EndpointTest(_Request):
    """Which event is sent as a sample."""

    event_type: EventType


class EndpointObject(Shown):
    """OpenAI's webhook endpoint; ours from ``enabled`` on."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    enabled: bool
    #: Why nothing is sent to it.
    disabled_reason: str | None
    #: First failure since the last success.
    failing_since: int | None

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> Self:
        """Show a row, without its secret."""
        return cls(**_shown(endpoint))


class EndpointWithSecret(EndpointObject):
    """The answer to a creation or a rotation, the only ones that show the secret."""

    signing_secret: str

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> Self:
        """Show a row with its secret."""
        return cls(**_shown(endpoint), signing_secret=endpoint.secret)


class EndpointDeleted(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class EndpointTested(BaseModel):
    """What the endpoint answered to the sample."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(BaseModel):
    """The events that there are."""

    object: Literal["list"] = "list"
    data: list[str]


class Attempt(BaseModel):
    """What came of one attempt; ``status_code`` is None where there was no answer."""

    number: int
    created_at: int
    status_code: int | None
    error: str | None
    milliseconds: int


class Delivery(Shown):
    """Ours: one event for one endpoint, with its attempts, oldest first."""

    id: str
    object: Literal["webhook_endpoint.delivery"] = "webhook_endpoint.delivery"
    created_at: int
    event_id: str
    event_type: str
    job_id: str
    status: str
    next_attempt_at: int | None
    delivered_at: int | None
    attempts: list[Attempt]

    @classmethod
    def of(cls, delivery: WebhookDelivery, attempts: list[WebhookAttempt]) -> Self:
        """Show a row with its log."""
        return cls(
            id=delivery.id,
            created_at=int(delivery.created_at.timestamp()),
            event_id=delivery.event_id,
            event_type=delivery.event_type,
            job_id=delivery.job_id,
            status=delivery.status,
            next_attempt_at=delivery.next_attempt_at and int(delivery.next_attempt_at.timestamp()),
            delivered_at=delivery.delivered_at and int(delivery.delivered_at.timestamp()),
            attempts=[
                Attempt(
                    number=attempt.number,
                    created_at=int(attempt.created_at.timestamp()),
                    status_code=attempt.status_code,
                    error=attempt.error,
                    milliseconds=attempt.milliseconds,
                )
                for attempt in attempts
            ],
        )


def _shown(endpoint: WebhookEndpoint) -> dict[str, object]:
    return {
        "id": endpoint.id,
        "created_at": int(endpoint.created_at.timestamp()),
        "updated_at": int(endpoint.updated_at.timestamp()),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_...{endpoint.secret[-4:]}",
        "enabled": endpoint.disabled_at is None,
        "disabled_reason": endpoint.disabled_reason,
        "failing_since": endpoint.failing_since and int(endpoint.failing_since.timestamp()),
    }
