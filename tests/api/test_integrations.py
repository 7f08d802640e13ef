"""Weights & Biases, as jobs ask for it."""

from __future__ import annotations

import sys
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import SecretStr

from tests.api.rows import add_file
from tests.api.support import Service

WANDB: Any = {"type": "wandb", "wandb": {"project": "greeters", "tags": ["a", "b"]}}


@pytest.fixture
def file(service: Service) -> str:
    with service.sessions.begin() as session:
        return add_file(session, service.tenant).id


@pytest.mark.parametrize("how", ["key", "offline"])
def test_it_is_taken_and_shown(
    service: Service, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "key":
        monkeypatch.setattr(service.settings, "wandb_api_key", SecretStr("k"))
    else:
        monkeypatch.setattr(service.settings, "wandb_mode", "offline")
    made = client.fine_tuning.jobs.create(model="tiny", training_file=file, integrations=[WANDB])
    for job in (made, client.fine_tuning.jobs.retrieve(made.id)):
        (shown,) = job.integrations or ()
        assert shown.type == "wandb"
        assert shown.wandb.model_dump() == {"project": "greeters", "tags": ["a", "b"], "name": None, "entity": None}


def test_without_the_operators_key_it_is_refused(client: OpenAI, file: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, integrations=[WANDB])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "integrations")
    assert "UORA_WANDB_API_KEY" in caught.value.message


def test_without_the_library_it_is_refused(
    service: Service, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.settings, "wandb_mode", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(openai.BadRequestError, match="pip install"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file, integrations=[WANDB])
    sweep = {"model": "tiny", "training_file": file, "validation_file": file, "sweep": {"seeds": [1]}}
    answer = service.http().post("/v1/fine_tuning/sweeps", json=sweep | {"integrations": [WANDB]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "integrations")


@pytest.mark.parametrize(
    ("integrations", "param"),
    [
        ([WANDB] * 6, "integrations"),
        ([{"type": "mlflow", "wandb": {"project": "p"}}], "integrations[0].type"),
        ([{"type": "wandb", "wandb": {}}], "integrations[0].wandb.project"),
        ([{"type": "wandb", "wandb": {"project": "p", "colour": "red"}}], "integrations[0].wandb.colour"),
    ],
)
def test_what_cannot_be_used(client: OpenAI, file: str, integrations: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, integrations=integrations)
    assert caught.value.param == param
