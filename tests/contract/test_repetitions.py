"""What comes twice is carried out once: the official client's own retries, and an Idempotency-Key."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx2 as httpx
import openai
import pytest

from api.files.models import File
from api.idempotency.models import IdempotencyRecord
from api.jobs.models import Job
from api.uploads.models import Upload
from tests.api.support import NO_TLS, Service

ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


class LosingAnswers(httpx.HTTPTransport):
    """A network on which so many answers of POST requests are lost after the server has given them."""

    def __init__(self, losses: int) -> None:
        super().__init__(verify=NO_TLS)
        self.losses = losses

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        if request.method == "POST" and self.losses > 0:
            answer.read()
            self.losses -= 1
            raise httpx.ReadError("the connection was lost", request=request)
        return answer


def client_on(service: Service, transport: httpx.BaseTransport) -> openai.OpenAI:
    """The official client as it comes: two retries."""
    http = openai.DefaultHttpxClient(transport=transport)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.tenant.key, http_client=http)


def count(service: Service, model: type[Any]) -> int:
    with service.sessions() as session:
        return session.query(model).filter_by(project_id=service.tenant.project_id).count()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not wait before it tries again."""
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0.01)


CREATED: dict[str, tuple[type[Any], Callable[[openai.OpenAI, str], Any]]] = {
    "file": (File, lambda client, _: client.files.create(file=ROWS, purpose="fine-tune")),
    "job": (Job, lambda client, file: client.fine_tuning.jobs.create(model="tiny", training_file=file)),
    "upload": (
        Upload,
        lambda client, _: client.uploads.create(
            bytes=9, filename="x.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        ),
    ),
}


@pytest.mark.parametrize("name", CREATED)
def test_the_clients_own_retries_make_no_second_one(service: Service, name: str) -> None:
    model, create = CREATED[name]
    client = client_on(service, losing := LosingAnswers(0))
    file = client.files.create(file=ROWS, purpose="fine-tune").id
    before = count(service, model)
    losing.losses = 2  # all that the client has retries for
    made = create(client, file)
    assert losing.losses == 0
    assert count(service, model) == before + 1
    with service.sessions() as session:
        newest = session.query(model).order_by(model.seq.desc()).first()
        assert newest.id == made.id
    another = create(client, file)  # is meant
    assert another.id != made.id
    assert count(service, model) == before + 2


def test_a_retry_of_what_failed_is_carried_out(service: Service) -> None:
    client = client_on(service, LosingAnswers(1))
    with pytest.raises(openai.NotFoundError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file="file-unknown")
    assert caught.value.request.headers["x-stainless-retry-count"] == "1"
    assert caught.value.code == "file_not_found"
    assert count(service, Job) == 0


def test_a_key_stands_for_one_request(service: Service) -> None:
    client = service.client()
    file = client.files.create(file=ROWS, purpose="fine-tune").id

    def create(key: str, **fields: Any) -> Any:
        body = {"model": "tiny", "training_file": file} | fields
        return client.fine_tuning.jobs.with_raw_response.create(**body, extra_headers={"Idempotency-Key": key})

    first, again, another = create("one"), create("one"), create("two")
    assert first.parse().id == again.parse().id != another.parse().id
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert count(service, Job) == 2
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create("one", seed=7)
    assert (caught.value.code, caught.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    with pytest.raises(openai.BadRequestError):
        create("x" * 256)
    # Of another project it is another's.
    stranger = service.client(service.stranger)
    other = stranger.files.create(file=ROWS, purpose="fine-tune", extra_headers={"Idempotency-Key": "one"})
    assert other.id != file


def test_many_at_once_make_one(service: Service) -> None:
    client = service.client()
    file = client.files.create(file=ROWS, purpose="fine-tune").id

    def create(_: int) -> str:
        headers = {"Idempotency-Key": "at-once"}
        return client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_headers=headers).id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(create, range(8)))) == 1
    assert count(service, Job) == 1


def test_an_old_answer_is_not_given_to_a_late_retry(service: Service) -> None:
    http = service.http()
    upload = {"bytes": 9, "filename": "x.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    retry = {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "5"}
    first = http.post("/v1/uploads", json=upload).json()["id"]
    assert http.post("/v1/uploads", json=upload, headers=retry).json()["id"] == first
    with service.sessions.begin() as session:
        for record in session.query(IdempotencyRecord):
            record.created_at -= timedelta(seconds=5 + 61)
    assert http.post("/v1/uploads", json=upload, headers=retry).json()["id"] != first


def test_the_secret_of_a_key_is_not_kept(service: Service) -> None:
    http, headers = service.http(), {"Idempotency-Key": "a-key"}
    path = f"/v1/organization/projects/{service.tenant.project_id}/api_keys"
    made = http.post(path, json={"name": "x"}, headers=headers)
    again = http.post(path, json={"name": "x"}, headers=headers)
    assert again.status_code == 409
    assert again.json()["error"]["code"] == "answer_not_kept"
    assert made.json()["id"] in again.json()["error"]["message"]
    assert "Rotate the key" in again.json()["error"]["message"]
    with service.sessions() as session:
        kept = [record.body or "" for record in session.query(IdempotencyRecord)]
    assert not any(made.json()["value"] in body for body in kept)
