"""Models that a project shares with another, through the official client of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai import OpenAI

from api.jobs.models import JobStatus
from tests.api.engine import START, delta, finish
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service, Tenant, make_tenant

HI: list[Any] = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Shared:
    """A final model and a checkpoint, on a base model whose name has a slash."""

    final: str
    checkpoint: str
    job_id: str


@pytest.fixture
def models(service: Service) -> Shared:
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, model="org/slashed")
        final, checkpoint = (add_adapter(session, service.tenant, job, step=step).id for step in (None, 5))
        job.fine_tuned_model = final
        return Shared(final, checkpoint, job.id)


@pytest.fixture
def stranger(service: Service) -> OpenAI:
    return service.client(service.stranger)


def share(client: OpenAI, model: str, *tenants: Tenant) -> list[str]:
    """Ids of the permissions."""
    ids = [tenant.project_id for tenant in tenants]
    return [made.id for made in client.fine_tuning.checkpoints.permissions.create(model, project_ids=ids)]


def answers(client: OpenAI, model: str) -> bool:
    try:
        return client.chat.completions.create(model=model, messages=HI).model == model
    except openai.NotFoundError:
        return False


def test_a_shared_model_answers_until_the_permission_is_taken_away(
    service: Service, client: OpenAI, stranger: OpenAI, models: Shared
) -> None:
    assert not answers(stranger, models.checkpoint)
    (permission,) = share(client, models.checkpoint, service.stranger)
    assert answers(stranger, models.checkpoint)
    assert service.engine.requests[-1]["project"] == service.stranger.project_id
    assert not answers(stranger, models.final)

    deleted = client.fine_tuning.checkpoints.permissions.delete(
        permission, fine_tuned_model_checkpoint=models.checkpoint
    )
    assert (deleted.id, deleted.deleted, deleted.object) == (permission, True, "checkpoint.permission")
    assert not answers(stranger, models.checkpoint)
    assert answers(client, models.checkpoint)


def test_a_shared_model_is_listed_with_its_owner(
    service: Service, client: OpenAI, stranger: OpenAI, models: Shared
) -> None:
    share(client, models.final, service.stranger)
    share(client, models.checkpoint, service.stranger)
    tuned = {model.id: model.owned_by for model in stranger.models.list() if model.id.startswith("ft:")}
    assert tuned == dict.fromkeys((models.final, models.checkpoint), service.tenant.slug)
    assert stranger.models.retrieve(models.final).owned_by == service.tenant.slug
    assert {model.id for model in client.models.list() if model.id.startswith("ft:")} == {models.final}


def test_a_classifier_can_be_shared(service: Service, client: OpenAI) -> None:
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, task="classification")
        name = add_adapter(session, service.tenant, job).id
    share(client, name, service.stranger)
    answer = service.http(service.stranger).post("/v1/classify", json={"model": name, "input": "an apple"})
    assert (answer.status_code, answer.json()["data"][0]["label"]) == (200, "tool")


def test_a_shared_model_can_be_asked_and_nothing_else(
    service: Service, client: OpenAI, stranger: OpenAI, models: Shared
) -> None:
    share(client, models.final, service.stranger)
    with service.sessions.begin() as session:
        file = add_file(session, service.stranger).id
    with pytest.raises(openai.PermissionDeniedError, match="only its own project"):
        stranger.models.delete(models.final)
    assert service.http(service.stranger).get(f"/v1/models/{models.final}/adapter").status_code == 403
    with pytest.raises(openai.NotFoundError) as tuned:
        stranger.fine_tuning.jobs.create(model=models.final, training_file=file)
    assert tuned.value.code == "model_not_found"
    for call in (
        lambda: share(stranger, models.final, service.tenant),
        lambda: stranger.fine_tuning.checkpoints.permissions.list(models.final),
        lambda: stranger.fine_tuning.jobs.retrieve(models.job_id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert answers(client, models.final)


def test_permissions_are_listed_in_either_order(service: Service, client: OpenAI, models: Shared) -> None:
    with service.sessions.begin() as session:
        tenants = [make_tenant(session, f"Guest {number}") for number in range(3)]
    made = share(client, models.final, *tenants)
    share(client, models.checkpoint, tenants[0])
    permissions = client.fine_tuning.checkpoints.permissions
    raw = permissions.with_raw_response.list(models.final)
    assert "%2F" in str(raw.http_request.url)
    assert [found.id for found in permissions.list(models.final, limit=1)] == made[::-1]
    assert [found.id for found in permissions.list(models.final, limit=2, order="ascending")] == made
    page = permissions.list(models.final, project_id=tenants[1].project_id)
    assert [(found.id, found.project_id, found.object) for found in page] == [
        (made[1], tenants[1].project_id, "checkpoint.permission")
    ]


def test_sharing_twice_is_as_good_as_once(service: Service, client: OpenAI, models: Shared) -> None:
    first = share(client, models.final, service.stranger)
    assert share(client, models.final, service.stranger, service.stranger) == first


@pytest.mark.parametrize("wrong", ["proj_unknown", "own"])
def test_it_is_shared_with_other_projects_only(service: Service, client: OpenAI, models: Shared, wrong: str) -> None:
    wrong = service.tenant.project_id if wrong == "own" else wrong
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.checkpoints.permissions.create(
            models.final, project_ids=[service.stranger.project_id, wrong]
        )
    assert caught.value.param == "project_ids[1]"
    assert list(client.fine_tuning.checkpoints.permissions.list(models.final)) == []


def test_a_permission_of_another_model_is_not_found(service: Service, client: OpenAI, models: Shared) -> None:
    (permission,) = share(client, models.final, service.stranger)
    with pytest.raises(openai.NotFoundError) as caught:
        client.fine_tuning.checkpoints.permissions.delete(permission, fine_tuned_model_checkpoint=models.checkpoint)
    assert caught.value.code == "permission_not_found"


def test_a_deleted_model_takes_its_permissions_along(
    service: Service, client: OpenAI, stranger: OpenAI, models: Shared
) -> None:
    share(client, models.final, service.stranger)
    share(client, models.checkpoint, service.stranger)
    client.models.delete(models.final)
    assert not answers(stranger, models.final)
    assert not any(model.id.startswith("ft:") for model in stranger.models.list())


def test_an_answer_that_has_begun_ends_though_its_model_is_deleted(
    service: Service, client: OpenAI, stranger: OpenAI, models: Shared
) -> None:
    share(client, models.final, service.stranger)
    service.engine.lines = [START, delta("Hel"), delta("lo"), finish()]
    service.engine.pause_seconds = 0.1
    stream = stranger.chat.completions.create(model=models.final, messages=HI, stream=True)
    next(stream)
    client.models.delete(models.final)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello"
    assert not answers(stranger, models.final)
