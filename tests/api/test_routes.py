"""What holds for all routes, found by walking the route table: a new one cannot be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from sqlalchemy.orm import Session

from api.auth import current_caller
from api.database import new_id, now
from api.jobs.models import Checkpoint, JobStatus
from api.jobs.repository import add_event
from api.main import create_app
from api.permissions.models import ModelPermission
from api.projects.service import new_api_key
from api.router import PUBLIC_ROUTES
from api.scopes import Scope
from api.settings import Settings
from api.uploads.models import Upload, UploadPart
from api.webhooks.models import EventType, WebhookEndpoint
from api.webhooks.sending import new_secret
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service, make_tenant
from uora.spec import UoraSpec

#: Of the upload that is to be completed.
PART = "part_private"


@dataclass(frozen=True)
class Route:
    """A row of the route table."""

    method: str
    path: str
    asks_for_caller: bool


def all_routes() -> list[Route]:
    """Every method and path that the app answers to."""
    app = create_app(Settings(_env_file=None, engine_token="x"))
    return [
        Route(method, str(context.path), asks_for_caller(context))
        for context in iter_route_contexts(app.routes)
        for method in sorted(context.methods or ())
    ]


def asks_for_caller(context: Any) -> bool:
    """Whether the route's dependencies end in the key's check."""
    if not isinstance(context.original_route, APIRoute):
        return False

    def walk(dependant: Dependant) -> bool:
        return dependant.call is current_caller or any(walk(below) for below in dependant.dependencies)

    return walk(context.dependant)


ROUTES = all_routes()
TENANT_ROUTES = [route for route in ROUTES if route.asks_for_caller]
#: What only an organization-wide key may do: tests/api/test_keys.py.
OF_ORGANIZATIONS = ("/v1/organization/admin_api_keys", "/v1/organization/projects/{project_id}/archive")
ID_ROUTES = [route for route in TENANT_ROUTES if "{" in route.path and not route.path.startswith(OF_ORGANIZATIONS)]


def test_the_walk_sees_the_routes() -> None:
    assert len(TENANT_ROUTES) >= 17
    assert len(ID_ROUTES) >= 12


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_a_route_asks_for_a_key_or_is_public(route: Route) -> None:
    assert route.asks_for_caller != (route.path in PUBLIC_ROUTES)


def test_a_public_route_exists() -> None:
    assert {route.path for route in ROUTES} >= PUBLIC_ROUTES


#: Routes that do nothing to a job that is worked on.
OF_ENDED_JOBS = {
    "DELETE /v1/fine_tuning/jobs/{job_id}",
    "POST /v1/fine_tuning/jobs/{job_id}/retry",
    "POST /v1/fine_tuning/jobs/{job_id}/clone",
}


@pytest.fixture
def ids(service: Service) -> dict[str, str]:
    """Something of the first project for each parameter of a path."""
    with service.sessions.begin() as session:
        job = add_job(
            session, service.tenant, status=JobStatus.RUNNING, pause_requested=True, sweep_id=new_id("ftsweep-")
        )
        add_event(session, job.id, message="private")
        file = add_file(session, service.tenant)
        service.settings.storage_dir.joinpath(file.id).write_bytes(b"private...")
        model = add_adapter(session, service.tenant, job)
        job.fine_tuned_model = model.id
        add_adapter(session, service.tenant, job, step=5)
        checkpoint = session.query(Checkpoint).filter_by(job_id=job.id).one()
        failed = add_job(
            session,
            service.tenant,
            status=JobStatus.FAILED,
            training_file=add_file(session, service.tenant).id,
            adapter=UoraSpec(r=8).model_dump(mode="json"),
        )
        return {
            "{file_id}": file.id,
            "{job_id}": job.id,
            "{sweep_id}": str(job.sweep_id),
            "{model:path}": model.id,
            "{checkpoint_id}": checkpoint.id,
            **dict.fromkeys(OF_ENDED_JOBS, failed.id),
            "{project_id}": service.tenant.project_id,
            "{key_id}": new_api_key(session, service.tenant.project_id, name="private", scopes=[Scope.READ])[0].id,
            "{permission_id}": add_permission(session, service, model.id),
            "{rate_limit_id}": "rl-all-models",
            "{endpoint_id}": add_endpoint(session, service),
            # Of which a part is missing where one is to be added, and none where it is to be completed.
            "{upload_id}": add_upload(session, service, size=11),
            "POST /v1/uploads/{upload_id}/complete": add_upload(session, service, size=7, part=PART),
        }


def add_upload(session: Session, service: Service, *, size: int, part: str | None = None) -> str:
    """One of 7 bytes so far."""
    part = part or new_id("part_")
    upload = Upload(
        id=new_id("upload_"),
        project_id=service.tenant.project_id,
        filename="private.jsonl",
        purpose="fine-tune",
        mime_type="text/jsonl",
        bytes=size,
        expires_at=now() + timedelta(hours=1),
    )
    session.add(upload)
    session.flush()
    session.query(UploadPart).filter_by(id=part).delete()  # an earlier test's
    session.add(UploadPart(id=part, upload_id=upload.id, bytes=7, storage_key=part))
    service.settings.storage_dir.joinpath(part).write_bytes(b"private")
    return upload.id


def add_permission(session: Session, service: Service, model: str) -> str:
    """Of a third project's."""
    guest = make_tenant(session, "Guest")
    permission = ModelPermission(
        id=new_id("cp_"), project_id=service.tenant.project_id, model=model, shared_with=guest.project_id
    )
    session.add(permission)
    return permission.id


def add_endpoint(session: Session, service: Service) -> str:
    """One that answers, though with an error."""
    endpoint = WebhookEndpoint(
        id=new_id("whe_"),
        project_id=service.tenant.project_id,
        name="private",
        url=f"{service.url}/healthz",
        event_types=[],
        secret=new_secret(),
        updated_at=now(),
    )
    session.add(endpoint)
    return endpoint.id


def content_of(route: Route, service: Service) -> dict[str, Any]:
    """What a route cannot do without, as httpx takes it."""
    if route.path.endswith("/parts"):
        return {"files": {"data": b"more"}}
    return {"json": body_of(route, service)}


def body_of(route: Route, service: Service) -> dict[str, Any] | None:
    """The JSON among it."""
    if route.path.endswith("/complete"):
        return {"part_ids": [PART]}
    if route.method == "POST" and route.path.endswith("/permissions"):
        with service.sessions.begin() as session:
            return {"project_ids": [make_tenant(session, "Guest").project_id]}
    if route.method == "POST" and route.path.endswith("/quotas"):
        return {"jobs_queued": 1000}
    if route.method == "POST" and route.path.endswith("/{rate_limit_id}"):
        return {"max_requests_per_1_minute": 1000}
    if route.method == "POST" and route.path.startswith("/v1/organization/") and not route.path.endswith("/rotate"):
        return {"name": "another name"}
    return {"event_type": EventType.FAILED} if route.path.endswith("/test") else None


@pytest.mark.parametrize("route", ID_ROUTES, ids=str)
def test_another_projects_key_finds_nothing(service: Service, ids: dict[str, str], route: Route) -> None:
    for parameter in ("{job_id}", "{upload_id}"):
        ids[parameter] = ids.get(f"{route.method} {route.path}", ids[parameter])
    path = route.path
    for parameter, value in ids.items():
        path = path.replace(parameter, value)
    assert "{" not in path, f"add something for the parameter of {route.path} to the fixture 'ids'"
    content = content_of(route, service)
    foreign = service.http(service.stranger).request(route.method, path, **content)
    place = next(number for number, part in enumerate(route.path.split("/")) if part.startswith("{"))
    unknown = service.http(service.stranger).request(
        route.method, path.replace(path.split("/")[place], new_id("x")), **content
    )
    assert foreign.status_code == 404, foreign.text
    assert set(foreign.json()["error"]) == {"message", "type", "param", "code"}
    assert foreign.json()["error"]["code"] == unknown.json()["error"]["code"]
    own = service.http(service.tenant).request(route.method, path, **content)
    assert own.status_code in (200, 202), own.text


@pytest.mark.parametrize("route", TENANT_ROUTES, ids=str)
def test_no_route_answers_without_a_key(service: Service, route: Route) -> None:
    http = service.http()
    http.headers.pop("authorization")
    body = {"model": "tiny", "training_file": "x", "messages": [{"role": "user", "content": "x"}]}
    body = {k: v for k, v in body.items() if ("chat" in route.path) == (k == "messages") or k == "model"}
    answer = http.request(route.method, route.path, json=body)
    assert answer.status_code == 401


def test_lists_show_nothing_of_another_project(service: Service, ids: dict[str, str]) -> None:
    stranger = service.client(service.stranger)
    assert list(stranger.files.list()) == []
    assert list(stranger.fine_tuning.jobs.list()) == []
    assert not any(model.id.startswith("ft:") for model in stranger.models.list())


def test_the_openapi_document_names_the_error_of_every_route(service: Service) -> None:
    document = service.http().get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
