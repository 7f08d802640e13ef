"""Files through the official client, and what must not stay behind."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from api.jobs.models import JobStatus
from api.jobs.repository import move_job
from tests.api.support import Service

ROWS = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


def test_a_file_comes_back_as_it_was_sent(service: Service, client: OpenAI) -> None:
    content = bytes(range(256)) * 3000  # several chunks of the form parser
    created = client.files.create(file=("data.bin", content), purpose="user_data")
    assert created.id.startswith("file-")
    assert (created.filename, created.bytes, created.purpose) == ("data.bin", len(content), "user_data")
    assert client.files.retrieve(created.id) == created
    assert client.files.wait_for_processing(created.id).status == "processed"
    assert client.files.content(created.id).read() == content


def test_raw_bytes_and_expiry_are_accepted(client: OpenAI) -> None:
    created = client.files.create(
        file=ROWS, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert created.filename == "upload"


def test_a_path_in_the_name_is_dropped(client: OpenAI) -> None:
    created = client.files.create(file=("../../etc\\pass\nwd", ROWS), purpose="fine-tune")
    assert "/" not in created.filename
    assert "\\" not in created.filename
    assert created.filename.endswith("wd")


def test_lists_filter_by_purpose_newest_first(client: OpenAI) -> None:
    first = client.files.create(file=ROWS, purpose="fine-tune")
    other = client.files.create(file=ROWS, purpose="evals")
    last = client.files.create(file=ROWS, purpose="fine-tune")
    assert [file.id for file in client.files.list()] == [last.id, other.id, first.id]
    assert [file.id for file in client.files.list(order="asc")] == [first.id, other.id, last.id]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [last.id, first.id]


def test_a_deleted_file_is_gone_with_its_bytes(service: Service, client: OpenAI) -> None:
    created = client.files.create(file=ROWS, purpose="fine-tune")
    assert service.stored_files() == [created.id]
    deleted = client.files.delete(created.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (created.id, True, "file")
    assert service.stored_files() == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(created.id)
        assert caught.value.code == "file_not_found"


def test_a_client_may_delete_while_it_pages(client: OpenAI) -> None:
    ids = {client.files.create(file=ROWS, purpose="fine-tune").id for _ in range(5)}
    deleted = {client.files.delete(file.id).id for file in client.files.list(limit=2)}
    assert deleted == ids
    assert list(client.files.list()) == []


def test_a_file_of_an_unfinished_job_stays(service: Service) -> None:
    client = service.client(max_retries=2)
    file = client.files.create(file=ROWS, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    with pytest.raises(openai.ConflictError) as caught:
        client.files.delete(file.id)
    assert caught.value.code == "file_in_use"
    assert job.id in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"  # asked once only
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file.id).deleted


def test_the_validation_file_is_in_use_too(service: Service, client: OpenAI) -> None:
    training, validation = (client.files.create(file=ROWS, purpose="fine-tune").id for _ in range(2))
    job = client.fine_tuning.jobs.create(model="tiny", training_file=training, validation_file=validation)
    with service.sessions.begin() as session:
        move_job(session, job.id, source=JobStatus.VALIDATING_FILES, target=JobStatus.QUEUED)
    with pytest.raises(openai.ConflictError):
        client.files.delete(validation)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "training"}, "purpose"),
        ({}, "purpose"),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "now", "expires_after[seconds]": "3600"},
            "expires_after.anchor",
        ),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "1"},
            "expires_after.seconds",
        ),
        ({"purpose": "fine-tune", "porpoise": "x"}, "porpoise"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(service: Service, fields: dict[str, str], param: str) -> None:
    answer = service.http().post("/v1/files", data=fields, files={"file": ("a.jsonl", ROWS)})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert service.stored_files() == []


def test_a_form_without_a_file_is_refused(service: Service) -> None:
    as_text = service.http().post("/v1/files", files={"file": (None, "text"), "purpose": (None, "fine-tune")})
    assert (as_text.status_code, as_text.json()["error"]["param"]) == (400, "file")
    as_json = service.http().post("/v1/files", json={"purpose": "fine-tune"})
    assert as_json.status_code == 400
    assert "multipart" in as_json.json()["error"]["message"]
    broken = service.http().post(
        "/v1/files", content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert broken.status_code == 400
    assert set(broken.json()["error"]) == {"message", "type", "param", "code"}


def test_a_file_over_the_limit_leaves_nothing(service: Service) -> None:
    limit = service.settings.max_upload_bytes
    for size in (limit + 1, limit + 200_000):  # over the store's limit, and over that of the body
        answer = service.http().post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"x" * size)})
        assert answer.status_code == 413, size
        assert answer.json()["error"]["code"] == "request_too_large"
    assert service.stored_files() == []
    exact = service.client().files.create(file=b"x" * limit, purpose="fine-tune")
    assert exact.bytes == limit


def test_an_upload_without_a_key_is_refused_before_it_is_read(service: Service) -> None:
    answer = service.http().post(
        "/v1/files",
        headers={"Authorization": "Bearer sk-wrong", "content-type": "multipart/form-data; boundary=x"},
        content=b"this is not even a form",
    )
    assert answer.status_code == 401
