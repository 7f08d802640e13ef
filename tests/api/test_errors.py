"""Every error has OpenAI's shape, and every answer has a request id."""

from __future__ import annotations

import inspect
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from api import errors
from api.errors import ApiError
from api.handlers import explain
from api.main import create_app
from api.settings import Settings
from tests.api.support import Service, serve

KEYS = {"message", "type", "param", "code"}


def subclasses(kind: type[ApiError]) -> set[type[ApiError]]:
    """The tree below ``kind``, with it."""
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(ApiError), key=str))
def test_every_error_is_drawn_in_the_tree(kind: type[ApiError]) -> None:
    body = kind("what happened", param="p").body()["error"]
    assert set(body) == KEYS
    assert body["code"] == kind.code
    drawn = (inspect.getdoc(errors) or "").splitlines()
    assert any(kind.__name__ in line.replace("├", " ").replace("└", " ").split() for line in drawn)
    assert 400 <= kind.status < 600


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/", None, 404, "unknown_url"),
        ("GET", "/v1/nothing", None, 404, "unknown_url"),
        ("GET", "/v1/files/", None, 404, "unknown_url"),
        ("PATCH", "/v1/files", None, 405, "method_not_allowed"),
        ("POST", "/v1/fine_tuning/jobs", b"{", 400, "invalid_json"),
        ("POST", "/v1/fine_tuning/jobs", b"", 400, "missing_required_parameter"),
        ("POST", "/v1/fine_tuning/jobs", b"[]", 400, "invalid_value"),
        ("POST", "/v1/fine_tuning/jobs", b"\xff", 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"model": "tiny"}', 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", b'"' + b"x" * 200_001 + b'"', 413, "request_too_large"),
        ("GET", "/v1/files?limit=many", None, 400, "invalid_value"),
        ("GET", "/v1/files?order=up", None, 400, "invalid_value"),
        ("GET", "/v1/files?purpose=up", None, 400, "invalid_value"),
    ],
)
def test_every_refusal_has_openais_shape(
    service: Service, method: str, path: str, content: bytes | None, status: int, code: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = service.http().request(method, path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == KEYS
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_body_without_a_length_is_limited_too(service: Service) -> None:
    def endless() -> Any:
        for _ in range(500):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    answer = service.http().post("/v1/fine_tuning/jobs", content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/models/a%00b", "/v1/files?after=%00", "/v1/files/%ff"])
def test_what_cannot_be_an_id_is_not_a_fault_of_the_server(service: Service, path: str) -> None:
    answer = service.http().get(path)
    assert answer.status_code in (400, 404), answer.text  # PostgreSQL refuses a NUL, SQLite looks for it
    assert set(answer.json()["error"]) == KEYS


def test_an_upload_sized_body_is_for_uploads_only(service: Service) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = service.http().post("/v1/chat/completions", content=b"x" * 300_000, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_the_client_reads_message_code_param_and_request_id(service: Service) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.client().fine_tuning.jobs.create(model="tiny", training_file="file-x", seed=-1)
    assert "seed: found -1; expected greater than or equal to 0." in caught.value.message
    assert (caught.value.code, caught.value.param) == ("invalid_value", "seed")
    assert caught.value.request_id is not None
    first, second = (service.client().models.list()._request_id for _ in range(2))
    assert first
    assert first != second


def test_what_nobody_caught_is_a_500_that_tells_nothing(tmp_path: Any) -> None:
    app: FastAPI = create_app(Settings(_env_file=None, home=tmp_path, engine_token="x"))

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the password is swordfish")

    with serve(app) as url, openai.DefaultHttpxClient(base_url=url) as http:
        answer = http.get("/broken")
    assert answer.status_code == 500
    assert set(answer.json()["error"]) == KEYS
    assert answer.json()["error"]["type"] == "server_error"
    assert "swordfish" not in answer.text
    assert answer.headers["x-request-id"].startswith("req_")


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int
    choice: str | list[int] = ""


class _Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inner: _Inner
    many: list[_Inner] = []


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["inner", "many", "number", "choice", "other"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_VALUES)
def test_any_body_that_is_refused_is_explained_by_a_path_in_it(body: Any) -> None:
    try:
        _Outer.model_validate(body)
    except ValidationError as refused:
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in refused.errors()]
        error = explain(details, body=body)
        assert error.status == 400
        assert error.message
        if error.param is not None and error.code != "missing_required_parameter":
            follow(body, error.param)


def follow(body: Any, path: str) -> None:
    """Walk ``a[0].b`` down; raises if it leads nowhere."""
    for step in path.replace("[", ".[").split("."):
        body = body[int(step[1:-1])] if step.startswith("[") else body[step]
