"""Classifications over HTTP, with a scripted engine behind the gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.jobs.models import JobStatus
from tests.api.engine import CLASSES
from tests.api.rows import add_adapter, add_job
from tests.api.support import Service

IMAGE = {"image": "data:image/png;base64,AAAA"}


def add_model(service: Service, task: str) -> str:
    with service.sessions.begin() as session:
        return add_adapter(
            session, service.tenant, add_job(session, service.tenant, status=JobStatus.SUCCEEDED, task=task)
        ).id


def ask(service: Service, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = service.http().post("/v1/classify", json=body)
    return answer.status_code, answer.json()


def test_the_answer_has_vllms_shape(service: Service) -> None:
    model = add_model(service, "classification")
    answer = service.http().post("/v1/classify", json={"model": model, "input": "saw"})
    assert answer.status_code == 200
    found = answer.json()
    assert found.pop("id").startswith("classify-")
    assert found.pop("created") > 0
    assert found == {
        "object": "list",
        "model": model,
        "system_fingerprint": "fp_test",
        "labels": ["fruit", "tool"],
        "data": [{"index": 0, "label": "tool", "probs": [0.25, 0.75], "num_classes": 2}],
        "usage": {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0, "prompt_tokens_details": None},
    }
    assert answer.headers["x-uora-provenance"] == f"base={'b' * 16}; frames={'f' * 16}; adapter={'a' * 16}"
    assert service.engine.requests == [
        {
            "base_model": "tiny",
            "adapter": service.engine.requests[0]["adapter"] | {"id": model, "digest": "d" * 64},
            "items": [{"text": "saw", "text_pair": None}],
        }
    ]


def test_a_regression_answers_with_numbers(service: Service) -> None:
    service.engine.classes = CLASSES | {"labels": [], "probabilities": [], "values": [3.5, -1.0]}
    status, found = ask(service, model=add_model(service, "regression"), input=["a", "b"])
    assert (status, found["labels"]) == (200, [])
    assert found["data"] == [
        {"index": 0, "label": None, "value": 3.5, "probs": [], "num_classes": 0},
        {"index": 1, "label": None, "value": -1.0, "probs": [], "num_classes": 0},
    ]


def test_all_kinds_of_items_reach_the_engine(service: Service) -> None:
    service.engine.classes = CLASSES | {"probabilities": [[0.5, 0.5]] * 3}
    pair = {"text": "a", "text_pair": "b"}
    status, _ = ask(service, model=add_model(service, "classification"), input=["x", pair, IMAGE])
    assert status == 200
    assert service.engine.requests[0]["items"] == [{"text": "x", "text_pair": None}, pair, IMAGE]


@pytest.mark.parametrize("task", ["chat", "completion"])
def test_a_model_of_text_is_refused(service: Service, task: str) -> None:
    for model in (add_model(service, task), "tiny"):
        status, found = ask(service, model=model, input="x")
        assert (status, found["error"]["code"], found["error"]["param"]) == (400, "model_not_supported", "model")
    assert service.engine.requests == []


def test_a_model_of_another_project_is_unknown(service: Service) -> None:
    model = add_model(service, "classification")
    answer = service.http(service.stranger).post("/v1/classify", json={"model": model, "input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert service.engine.requests == []


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "input"),
        (5, "input"),
        ({"txt": "a"}, "input.text"),
        (["a", {"text": 5}], "input[1].text"),
        ([{"image": "x", "text": "y"}], "input[0]"),
        (["x"] * 257, "input"),
    ],
    ids=lambda value: json.dumps(value)[:30],
)
def test_it_names_the_parameter(service: Service, value: Any, param: str) -> None:
    status, found = ask(service, model=add_model(service, "classification"), input=value)
    assert status == 400
    assert found["error"]["param"].startswith(param), found
    assert service.engine.requests == []


def test_refusals_of_the_engine(service: Service) -> None:
    model = add_model(service, "classification")
    error = {"code": "context_length_exceeded", "message": "input[1] has 70", "param": "input[1]"}
    service.engine.refusal = 400, {"error": error}
    status, found = ask(service, model=model, input=["a", "b"])
    assert (status, found["error"]["code"], found["error"]["param"]) == (400, "context_length_exceeded", "input[1]")
    service.engine.refusal = 503, {"error": {"code": "engine_busy", "message": "busy"}}
    answer = service.http().post("/v1/classify", json={"model": model, "input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_busy")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("change", [{"probabilities": []}, {"probabilities": [[1.0]]}, {"labels": None}], ids=str)
def test_a_broken_answer_is_no_answer(service: Service, change: dict[str, Any]) -> None:
    service.engine.classes = CLASSES | change
    assert ask(service, model=add_model(service, "classification"), input="a")[0] == 503
