"""Keys and projects."""

from __future__ import annotations

import hashlib
import time
from datetime import timedelta

import openai
import pytest
from sqlalchemy.orm import Session, sessionmaker

from api.caller import CALLER_SECONDS
from api.database import now
from api.errors import Conflict, InvalidRequest
from api.projects.models import ApiKey, Project
from api.projects.service import KEY_PREFIX, create_api_key, create_project, ensure_project, revoke_api_key
from tests.api.support import Service, Tenant


def wait_until_forgotten() -> None:
    """Until a key that was found good is looked for again."""
    time.sleep(CALLER_SECONDS)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Basic dXNlcjpwYXNz",
        "Bearer sk-uora-unknown",
        "Bearer ключ".encode(),
        "Bearer " + "x" * 4000,
    ],
)
def test_without_a_known_key_there_is_no_answer(service: Service, header: str | bytes | None) -> None:
    http = service.http()
    http.headers.pop("authorization")
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/files/x")):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} if method == "POST" else None
        answer = http.request(method, path, headers=headers, json=body)  # type: ignore[arg-type]
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_revoked_key_is_refused_within_a_second(service: Service) -> None:
    client = service.client()
    client.models.list()
    with service.sessions.begin() as session:
        assert revoke_api_key(session, service.tenant.key)
        assert not revoke_api_key(session, service.tenant.key)
        assert not revoke_api_key(session, "sk-uora-unknown")
    wait_until_forgotten()
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_the_project_header_must_be_the_keys_project(service: Service) -> None:
    for mine in (service.tenant.project_id, service.tenant.slug):
        assert service.client(project=mine).models.list().data
    for other in (service.stranger.project_id, "proj_unknown"):
        with pytest.raises(openai.AuthenticationError) as caught:
            service.client(project=other).models.list()
        assert caught.value.code == "mismatched_project"


def test_only_the_hash_of_a_key_is_kept(sessions: sessionmaker[Session], tenant: Tenant) -> None:
    assert tenant.key.startswith(KEY_PREFIX)
    with sessions() as session:
        row = session.query(ApiKey).filter_by(project_id=tenant.project_id).one()
    assert row.secret_sha256 == hashlib.sha256(tenant.key.encode()).hexdigest()
    values = [str(getattr(row, column.name)) for column in ApiKey.__table__.columns]
    assert not any(tenant.key in value for value in values)
    assert len(row.prefix) < len(tenant.key) / 2


def test_the_time_of_use_is_noted_about_once_a_minute(service: Service) -> None:
    def last_used() -> object:
        with service.sessions() as session:
            return session.query(ApiKey.last_used_at).filter_by(project_id=service.tenant.project_id).scalar()

    assert last_used() is None
    service.client().models.list()
    first = last_used()
    assert first is not None
    service.client().models.list()
    assert last_used() == first
    with service.sessions.begin() as session:
        session.query(ApiKey).filter_by(project_id=service.tenant.project_id).update(
            {"last_used_at": now() - timedelta(minutes=5)}
        )
    wait_until_forgotten()
    service.client().models.list()
    assert last_used() >= first  # type: ignore[operator]


def test_projects_are_ensured_and_slugs_kept_apart(sessions: sessionmaker[Session], tenant: Tenant) -> None:
    name = f"Ünusual Näme! {tenant.slug}"
    with sessions.begin() as session:
        project = ensure_project(session, name=name)
        assert ensure_project(session, name=name).id == project.id
        namesake = create_project(session, name)
        assert namesake.slug != project.slug
        for slug in (project.slug, namesake.slug):
            assert ":" not in slug
            assert slug.islower()
        with pytest.raises(Conflict):
            create_project(session, "other", slug=project.slug)
        with pytest.raises(InvalidRequest):
            create_project(session, "other", slug="a:b")
        key = create_api_key(session, project, name="laptop")
    with sessions() as session:
        stored = session.query(ApiKey).filter_by(project_id=project.id).one()
        assert (stored.name, session.query(Project).filter_by(name=name).count()) == ("laptop", 2)
    assert key != tenant.key
