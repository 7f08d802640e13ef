"""Keys: what each may do, how long, and who makes them, through the client that people administer OpenAI with."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import httpx
import openai
import pytest

from api.caller import CALLER_SECONDS
from api.database import now
from api.projects.models import ApiKey
from api.projects.service import hash_key, new_api_key
from api.scopes import MEMBER_SCOPES, Scope, needed_scope
from tests.api.rows import add_file
from tests.api.support import Service
from tests.api.test_routes import TENANT_ROUTES

KEYS = "/v1/organization/projects/{}/api_keys"


def key_with(service: Service, *scopes: Scope, organization_wide: bool = False) -> str:
    """The secret of a new key of the first project."""
    with service.sessions.begin() as session:
        project = service.tenant.project_id
        return new_api_key(session, project, name="k", scopes=scopes, organization_wide=organization_wide)[1]


def http(service: Service, key: str) -> httpx.Client:
    """With another key than the tenant's first."""
    client = service.http()
    client.headers["Authorization"] = f"Bearer {key}"
    return client


def administrator(service: Service, *, organization_wide: bool = False) -> Any:
    """``client.admin`` of the official client."""
    key = key_with(service, Scope.ADMIN, organization_wide=organization_wide)
    return service.client(admin_api_key=key).admin.organization


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def wait_until_forgotten() -> None:
    """Until a key that was found good is looked for again."""
    time.sleep(CALLER_SECONDS)


@pytest.mark.parametrize("scope", Scope)
def test_a_key_can_do_what_its_scope_says_and_nothing_else(service: Service, scope: Scope) -> None:
    """Every route: refused before anything of the request is looked at, or not for the want of a scope."""
    client = http(service, key_with(service, scope))
    for route in TENANT_ROUTES:
        needed = needed_scope(route.method, route.path)
        answer = client.request(route.method, route.path, json={"name": "x"})
        refused = answer.status_code == 403 and code_of(answer) == "missing_scope"
        assert refused == (needed is not scope), f"{route}: {answer.text}"
        if refused:
            assert f"Missing scopes: {needed}." in answer.json()["error"]["message"]


def test_scopes_are_where_they_are_expected() -> None:
    by_scope = {scope: {r.path for r in TENANT_ROUTES if needed_scope(r.method, r.path) is scope} for scope in Scope}
    assert by_scope[Scope.INFER] == {"/v1/chat/completions", "/v1/completions", "/v1/classify"}
    assert all(
        path.startswith(("/v1/organization", "/v1/fine_tuning/checkpoints", "/dashboard/keys"))
        for path in by_scope[Scope.ADMIN]
    )
    assert "/v1/fine_tuning/jobs" in by_scope[Scope.WRITE] & by_scope[Scope.READ]


def test_a_key_is_made_used_changed_and_revoked(service: Service) -> None:
    admin, project = administrator(service), service.tenant.project_id
    made = http(service, admin._client.admin_api_key).post(KEYS.format(project), json={"name": "laptop"}).json()
    assert set(made["scopes"]) == set(MEMBER_SCOPES)
    secret = made["value"]
    assert secret.startswith(made["redacted_value"].removesuffix("..."))
    assert len(made["redacted_value"]) < 20
    assert made["last_used_at"] is None

    assert http(service, secret).get("/v1/files").status_code == 200
    shown = admin.projects.api_keys.retrieve(made["id"], project_id=project)
    assert shown.last_used_at is not None
    assert shown.owner.service_account.name == "laptop"
    assert not hasattr(shown, "value")
    assert made["id"] in [key.id for key in admin.projects.api_keys.list(project)]

    path = f"{KEYS.format(project)}/{made['id']}"
    changed = http(service, admin._client.admin_api_key).post(path, json={"scopes": ["infer"]})
    assert changed.json()["scopes"] == ["infer"]
    wait_until_forgotten()
    assert code_of(http(service, secret).get("/v1/files")) == "missing_scope"

    assert admin.projects.api_keys.delete(made["id"], project_id=project).deleted
    wait_until_forgotten()
    assert http(service, secret).get("/v1/files").status_code == 401
    with pytest.raises(openai.NotFoundError):
        admin.projects.api_keys.retrieve(made["id"], project_id=project)
    with service.sessions() as session:  # what was a key is never stored
        assert session.query(ApiKey).filter_by(secret_sha256=hash_key(secret)).count() == 1


def test_an_expired_key_is_refused(service: Service) -> None:
    with service.sessions.begin() as session:
        key, secret = new_api_key(
            session, service.tenant.project_id, name="short", scopes=[Scope.READ], lifetime=timedelta(hours=1)
        )
        key_id = key.id
    assert http(service, secret).get("/v1/files").status_code == 200
    with service.sessions.begin() as session:
        session.get_one(ApiKey, session.query(ApiKey.seq).filter_by(id=key_id).scalar()).expires_at = now()
    wait_until_forgotten()
    assert http(service, secret).get("/v1/files").status_code == 401


@pytest.mark.parametrize("grace", [0, 3600])
def test_a_rotated_key_has_a_new_secret_and_the_old_one_for_a_while(service: Service, grace: int) -> None:
    admin, project = http(service, key_with(service, Scope.ADMIN)), service.tenant.project_id
    made = admin.post(KEYS.format(project), json={"name": "rotating"}).json()
    path = f"{KEYS.format(project)}/{made['id']}/rotate"
    rotated = admin.post(path, json={"grace_seconds": grace} if grace else None).json()
    assert rotated["id"] == made["id"]
    assert rotated["value"] != made["value"]
    assert http(service, rotated["value"]).get("/v1/files").status_code == 200
    assert http(service, made["value"]).get("/v1/files").status_code == (200 if grace else 401)
    assert (rotated["previous_value_expires_at"] is not None) == bool(grace)
    with service.sessions.begin() as session:
        session.query(ApiKey).filter_by(id=made["id"]).update({"previous_until": now()})
    wait_until_forgotten()
    assert http(service, made["value"]).get("/v1/files").status_code == 401


def test_organizations_are_for_organization_wide_keys(service: Service) -> None:
    own, wide = administrator(service), administrator(service, organization_wide=True)
    assert [project.id for project in own.projects.list()] == [service.tenant.project_id]
    assert {project.id for project in wide.projects.list()} >= {service.tenant.project_id, service.stranger.project_id}
    for attempt in (
        lambda: own.projects.create(name="another"),
        lambda: own.admin_api_keys.list(),
        lambda: own.admin_api_keys.create(name="x"),
        lambda: own.projects.archive(service.tenant.project_id),
    ):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            attempt()
        assert caught.value.code == "organization_key_required"
    with pytest.raises(openai.NotFoundError):
        own.projects.retrieve(service.stranger.project_id)

    project = wide.projects.create(name="Another Team")
    assert (project.name, project.status) == ("Another Team", "active")
    assert wide.projects.update(project.id, name="Renamed").name == "Renamed"
    made = http(service, wide._client.admin_api_key).post(KEYS.format(project.id), json={"name": "first"}).json()
    assert http(service, made["value"]).get("/v1/files").json()["data"] == []
    assert wide.projects.archive(project.id).status == "archived"
    wait_until_forgotten()
    assert http(service, made["value"]).get("/v1/files").status_code == 401
    assert project.id not in [each.id for each in wide.projects.list()]
    assert project.id in [each.id for each in wide.projects.list(include_archived=True)]


def test_organization_wide_keys_administer_and_nothing_else(service: Service) -> None:
    wide = administrator(service, organization_wide=True)
    made = wide.admin_api_keys.create(name="deputy")
    deputy = http(service, made.value)
    assert deputy.get("/v1/organization/projects").status_code == 200
    assert code_of(deputy.get("/v1/files")) == "missing_scope"
    assert made.id in [key.id for key in wide.admin_api_keys.list()]
    assert code_of(deputy.delete(f"/v1/organization/admin_api_keys/{made.id}")) == "invalid_value"
    assert wide.admin_api_keys.delete(made.id).deleted
    wait_until_forgotten()
    assert deputy.get("/v1/organization/projects").status_code == 401


def test_changes_are_written_down_with_their_key(service: Service) -> None:
    admin, project = administrator(service), service.tenant.project_id
    client = http(service, key := key_with(service, Scope.WRITE))
    with service.sessions.begin() as session:
        file_id = add_file(session, service.tenant).id
        key_id = session.query(ApiKey.id).filter_by(secret_sha256=hash_key(key)).scalar()
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
    assert client.delete(f"/v1/files/{file_id}").status_code == 404  # nothing changed, nothing is written
    (entry,) = admin.audit_logs.list(resource_ids=[file_id])
    assert (entry.type, entry.actor.api_key.id, entry.project.id) == ("file.deleted", key_id, project)
    assert entry.request_id.startswith("req_")
    made = http(service, admin._client.admin_api_key).post(KEYS.format(project), json={"name": "logged"})
    entries = list(admin.audit_logs.list(event_types=["api_key.created"]))
    assert [entry.model_extra["api_key.created"]["id"] for entry in entries] == [made.json()["id"]]
    assert made.json()["value"] not in str(entries)
    assert list(administrator_of_stranger(service).audit_logs.list(resource_ids=[file_id])) == []


def administrator_of_stranger(service: Service) -> Any:
    with service.sessions.begin() as session:
        key = new_api_key(session, service.stranger.project_id, name="k", scopes=[Scope.ADMIN])[1]
    return service.client(admin_api_key=key).admin.organization
