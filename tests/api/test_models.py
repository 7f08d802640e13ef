"""Models through the official client."""

from __future__ import annotations

from dataclasses import dataclass

import openai
import pytest
from openai import OpenAI

from api.jobs.models import JobStatus
from api.models.service import checkpoint_name, model_name
from tests.api.rows import add_adapter, add_job
from tests.api.support import Service


@dataclass(frozen=True)
class Tuned:
    """A job's models: the final one and two checkpoints."""

    job_id: str
    final: str
    first: str
    second: str

    @property
    def names(self) -> tuple[str, str, str]:
        return self.final, self.first, self.second


@pytest.fixture
def tuned(service: Service) -> Tuned:
    """Models of the first project, on a base model whose name has a slash."""
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, model="org/slashed")
        names = [add_adapter(session, service.tenant, job, step=step).id for step in (None, 5, 10)]
    return Tuned(job.id, *names)


def test_names_follow_openais_form() -> None:
    name = model_name("org/slashed", slug="acme", suffix=None, job_id="ftjob-0123abcd4567")
    assert name == "ft:org/slashed:acme::abcd4567"
    assert checkpoint_name(name, step=5) == "ft:org/slashed:acme::abcd4567:ckpt-step-5"
    assert model_name("tiny", slug="a", suffix="tone", job_id="ftjob-0123abcd4567") == "ft:tiny:a:tone:abcd4567"


def test_the_list_has_base_models_and_final_ones(service: Service, client: OpenAI, tuned: Tuned) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "org/slashed", tuned.final}
    assert models[tuned.final].owned_by == service.tenant.slug
    assert models[tuned.final].parent == models[tuned.final].root == "org/slashed"  # type: ignore[attr-defined]
    assert models["tiny"].parent is None  # type: ignore[attr-defined]
    assert {model.id for model in service.client(service.stranger).models.list()} == {"tiny", "org/slashed"}


def test_each_model_is_found_by_its_name(client: OpenAI, tuned: Tuned) -> None:
    for name in (*tuned.names, "tiny", "org/slashed"):
        found = client.models.retrieve(name)
        assert (found.id, found.object) == (name, "model")


def test_deleting_a_final_model_deletes_its_checkpoints(client: OpenAI, tuned: Tuned) -> None:
    deleted = client.models.delete(tuned.final)
    assert (deleted.id, deleted.deleted, deleted.object) == (tuned.final, True, "model")
    for name in tuned.names:
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
    assert list(client.fine_tuning.jobs.checkpoints.list(tuned.job_id)) == []


def test_deleting_a_checkpoint_leaves_the_rest(client: OpenAI, tuned: Tuned) -> None:
    client.models.delete(tuned.first)
    assert client.models.retrieve(tuned.final).id == tuned.final
    checkpoints = client.fine_tuning.jobs.checkpoints.list(tuned.job_id)
    assert [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints] == [tuned.second]


def test_a_base_model_cannot_be_deleted(client: OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def test_a_name_of_another_project_is_unknown(service: Service, tuned: Tuned) -> None:
    stranger = service.client(service.stranger)
    for name in (tuned.final, tuned.first, "nothing"):
        for call in (stranger.models.retrieve, stranger.models.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                call(name)
            assert caught.value.code == "model_not_found"
    assert service.client().models.retrieve(tuned.final).id == tuned.final
