"""Logging in: what is stored, who can read it, and what wins."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from api.projects.models import Project
from api.projects.service import create_api_key
from api.scopes import Scope
from tests.api.support import Service, serve
from tests.cli.conftest import Run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_login_is_stored_for_its_user_alone(bare: Run, service: Service, config: Path) -> None:
    done = bare("login", "--base-url", service.url, "--api-key", service.tenant.key)
    assert done.exit_code == 0, done.output
    assert (mode(config), mode(config.parent)) == (0o600, 0o700)
    stored = {"base_url": f"{service.url}/v1", "api_key": service.tenant.key}
    assert json.loads(config.read_text()) == {"profiles": {"default": stored}}
    assert [path.name for path in config.parent.iterdir()] == [config.name]
    assert bare("models", "list").exit_code == 0
    assert service.tenant.key not in done.output


def test_what_is_not_given_is_asked_for(bare: Run, service: Service, config: Path) -> None:
    done = bare("login", input=f"{service.url}/v1/\n{service.tenant.key}\n")
    assert done.exit_code == 0, done.output
    assert json.loads(config.read_text())["profiles"]["default"]["base_url"] == f"{service.url}/v1"
    assert service.tenant.key not in done.output


def test_profiles_stand_beside_each_other_and_the_environment_wins(
    bare: Run, service: Service, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for profile, tenant in (("default", service.tenant), ("other", service.stranger)):
        done = bare("--profile", profile, "login", "--base-url", service.url, "--api-key", tenant.key)
        assert done.exit_code == 0, done.output
    assert mode(config) == 0o600

    def project(*arguments: str) -> str:
        return str(json.loads(bare(*arguments, "admin", "projects", "list", "--json").stdout)[0]["id"])

    assert project() == service.tenant.project_id
    assert project("--profile", "other") == service.stranger.project_id
    monkeypatch.setenv("UORA_API_KEY", service.stranger.key)
    assert project() == service.stranger.project_id


def test_a_stored_key_goes_to_its_service_alone(
    bare: Run, service: Service, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bare("login", "--base-url", service.url, "--api-key", service.tenant.key).exit_code == 0
    monkeypatch.setenv("UORA_BASE_URL", "http://127.0.0.1:1")
    done = bare("models", "list")
    assert (done.exit_code, "set UORA_API_KEY too" in done.stderr) == (1, True)


def test_what_is_refused_is_not_stored(bare: Run, service: Service, config: Path) -> None:
    wrong = bare("login", "--base-url", service.url, "--api-key", "sk-uora-wrong")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "`uora login` stores another key" in wrong.stderr
    nowhere = bare("login", "--base-url", "127.0.0.1:8000", "--api-key", "x")
    assert "expected one like http://" in nowhere.stderr
    assert not config.exists()


def test_another_server_is_not_taken_for_the_service(bare: Run, config: Path) -> None:
    async def page(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"<html>Welcome"})  # type: ignore[operator]

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        if scope["type"] == "http":
            await page(scope, receive, send)
        else:
            await send({"type": "lifespan.startup.complete"})  # type: ignore[operator]

    with serve(app) as url:
        done = bare("login", "--base-url", url, "--api-key", "x")
    assert done.exit_code == 1
    assert "is not this service: check the base URL" in done.stderr
    assert not config.exists()


def test_a_key_that_may_not_read_can_log_in(bare: Run, service: Service) -> None:
    with service.sessions.begin() as session:
        project = session.query(Project).filter_by(id=service.tenant.project_id).one()
        key = create_api_key(session, project, name="keys only", scopes=[Scope.ADMIN])
    assert bare("login", "--base-url", service.url, "--api-key", key).exit_code == 0
    refused = bare("jobs", "list")
    assert refused.exit_code == 1
    assert "read" in refused.stderr
    assert "`uora keys create` makes a key with it" in refused.stderr


def test_a_damaged_file_is_named(bare: Run, config: Path) -> None:
    config.parent.mkdir(parents=True)
    config.write_text("{")
    done = bare("jobs", "list")
    assert done.exit_code == 1
    assert f"Error: {config} is damaged; delete it and run `uora login`.\n" == done.stderr
