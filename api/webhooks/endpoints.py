"""``/v1/webhook_endpoints`` and ``/v1/webhook_event_types``"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.concurrency import run_in_threadpool

from api.auth import CallerDep
from api.dependencies import PageParams, ReadSessionDep, ResourcesDep, SessionDep
from api.pagination import ListObject, PageQuery
from api.routing import Router
from api.webhooks import service
from api.webhooks.models import EventType, WebhookEndpoint
from api.webhooks.schemas import (
    Delivery,
    EndpointCreate,
    EndpointDeleted,
    EndpointObject,
    EndpointTest,
    EndpointTested,
    EndpointUpdate,
    EndpointWithSecret,
    EventTypeList,
    SecretRotate,
)

router = Router(tags=["webhooks"])

EndpointPage = Annotated[PageQuery, Depends(PageParams(default_limit=20, max_limit=100))]


@router.get("/webhook_event_types")
def list_event_types(_caller: CallerDep) -> EventTypeList:
    """List the events that an endpoint can be told of."""
    return EventTypeList(data=list(EventType))


@router.post("/webhook_endpoints")
def create_endpoint(
    body: EndpointCreate, caller: CallerDep, session: SessionDep, resources: ResourcesDep
) -> EndpointWithSecret:
    """Add an endpoint. Only this answer and a rotation's show its secret."""
    allow_private = resources.settings.webhook_allow_private
    return EndpointWithSecret.of(service.create(session, caller, body=body, allow_private=allow_private))


@router.get("/webhook_endpoints")
def list_endpoints(caller: CallerDep, session: ReadSessionDep, query: EndpointPage) -> ListObject[EndpointObject]:
    """List the project's endpoints, newest first."""
    return ListObject.of(service.list_endpoints(session, caller, query=query), EndpointObject.of)


@router.get("/webhook_endpoints/{endpoint_id}")
def get_endpoint(endpoint_id: str, caller: CallerDep, session: ReadSessionDep) -> EndpointObject:
    """Describe one endpoint."""
    return EndpointObject.of(service.get(session, caller, endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}")
def update_endpoint(
    endpoint_id: str,
    caller: CallerDep,
    session: SessionDep,
    resources: ResourcesDep,
    body: EndpointUpdate | None = None,
) -> EndpointObject:
    """Change an endpoint."""
    allow_private = resources.settings.webhook_allow_private
    body = body or EndpointUpdate()
    return EndpointObject.of(service.update(session, caller, endpoint_id, body=body, allow_private=allow_private))


@router.delete("/webhook_endpoints/{endpoint_id}")
def delete_endpoint(endpoint_id: str, caller: CallerDep, session: SessionDep) -> EndpointDeleted:
    """Delete an endpoint; nothing more is sent to it."""
    service.delete(session, caller, endpoint_id)
    return EndpointDeleted(id=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
def rotate_secret(
    endpoint_id: str, caller: CallerDep, session: SessionDep, body: SecretRotate | None = None
) -> EndpointWithSecret:
    """Give an endpoint a new secret."""
    keep_old = body is not None and body.keep_old_secret_active_for_24_hours
    return EndpointWithSecret.of(service.rotate_secret(session, caller, endpoint_id, keep_old=keep_old))


@router.post("/webhook_endpoints/{endpoint_id}/test")
async def test_endpoint(
    endpoint_id: str, body: EndpointTest, caller: CallerDep, resources: ResourcesDep
) -> EndpointTested:
    """Send a sample event at once, and say what the endpoint answered."""

    def look_up() -> WebhookEndpoint:
        with resources.read_sessions() as session:
            return service.get(session, caller, endpoint_id)

    endpoint = await run_in_threadpool(look_up)  # no session is held while the endpoint takes its time
    allow_private = resources.settings.webhook_allow_private
    status_code = await service.send_sample(endpoint, body.event_type, allow_private=allow_private)
    return EndpointTested(webhook_endpoint_id=endpoint.id, event_type=body.event_type, status_code=status_code)


@router.get("/webhook_endpoints/{endpoint_id}/deliveries")
def list_deliveries(
    endpoint_id: str, caller: CallerDep, session: ReadSessionDep, query: EndpointPage
) -> ListObject[Delivery]:
    """List what was sent to an endpoint, or is to be, with every attempt, newest first."""
    page, attempts = service.list_deliveries(session, caller, endpoint_id, query=query)
    return ListObject.of(page, lambda delivery: Delivery.of(delivery, attempts[delivery.id]))
