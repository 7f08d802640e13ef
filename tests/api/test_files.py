"""Files through the official client, and what must not stay behind."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from api.database import now
from api.files.models import File
from api.jobs.models import JobStatus
from api.jobs.repository import move_job
from tests.api.support import ROOT, Service

ROWS = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


def test_a_file_comes_back_as_it_was_sent(service: Service, client: OpenAI) -> None:
    content = bytes(range(256)) * 3000  # several chunks of the form parser
    created = client.files.create(file=("data.bin", content), purpose="user_data")
    assert created.id.startswith("file-")
    assert (created.filename, created.bytes, created.purpose) == ("data.bin", len(content), "user_data")
    assert client.files.retrieve(created.id) == created
    assert client.files.wait_for_processing(created.id).status == "processed"
    assert client.files.content(created.id).read() == content


def test_a_download_that_broke_off_goes_on(service: Service, client: OpenAI) -> None:
    created = client.files.create(file=bytes(range(200)), purpose="user_data")
    url = f"/v1/files/{created.id}/content"
    whole = service.http().get(url)
    assert (whole.status_code, whole.headers["content-length"]) == (200, "200")
    assert whole.headers["content-type"] == "application/octet-stream"
    rest = service.http().get(url, headers={"range": "bytes=150-", "if-range": whole.headers["etag"]})
    assert (rest.status_code, rest.content) == (206, bytes(range(150, 200)))
    assert rest.headers["content-range"] == "bytes 150-199/200"
    assert service.http().get(url, headers={"range": "bytes=200-"}).status_code == 416


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


def expire(service: Service, file_id: str) -> None:
    with service.sessions.begin() as session:
        session.query(File).filter_by(id=file_id).one().expires_at = now() - timedelta(seconds=1)


def test_an_expired_file_is_gone_for_its_users(service: Service, client: OpenAI) -> None:
    ids = [
        client.files.create(
            file=ROWS, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 2_592_000}
        ).id
        for _ in range(3)
    ]
    first = client.files.retrieve(ids[0])
    assert first.expires_at == first.created_at + 2_592_000
    expire(service, ids[1])
    assert [file.id for file in client.files.list(limit=1)] == [ids[2], ids[0]]
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(ids[1])
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="tiny", training_file=ids[1])
    page = service.http().get("/v1/files", params={"after": ids[1]}).json()  # a client may expire while it pages
    assert [file["id"] for file in page["data"]] == [ids[0]]


def test_an_upload_that_breaks_off_leaves_nothing(service: Service) -> None:
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = (
            "POST /v1/files HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {service.tenant.key}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 900000\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        connection.sendall(head.encode() + b"y" * 400_000)
    assert service.client().files.create(file=ROWS, purpose="fine-tune").id in service.stored_files()
    assert len(service.stored_files()) == 1


MEMORY_SCRIPT = """
import asyncio, resource, sys
from pathlib import Path
import httpx
from api.database import make_engine, make_sessions
from api.main import create_app
from api.settings import Settings
from tests.api.support import RecordingQueue, make_tenant, migrate

MIB = 2**20

async def main(home):
    settings = Settings(_env_file=None, home=Path(home), engine_token="x")
    migrate(settings.database_url)
    engine = make_engine(settings.database_url)
    with make_sessions(engine).begin() as session:
        key = make_tenant(session, "Acme").key
    app = create_app(settings, queue=RecordingQueue())
    head = b'--x\\r\\nContent-Disposition: form-data; name="purpose"\\r\\n\\r\\nuser_data\\r\\n--x\\r\\n'
    head += b'Content-Disposition: form-data; name="file"; filename="a"\\r\\n\\r\\n'

    async def body(size):
        yield head
        for _ in range(size):
            yield b"y" * MIB
        yield b"\\r\\n--x--\\r\\n"

    async with app.router.lifespan_context(app):
        headers = {"authorization": f"Bearer {key}", "content-type": "multipart/form-data; boundary=x"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers, timeout=60) as http:
            peaks = []
            for size in (8, 128):
                answer = await http.post("/v1/files", content=body(size))
                assert answer.json()["bytes"] == size * MIB, answer.text
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(peaks[1] - peaks[0])

asyncio.run(main(sys.argv[1]))
"""


def test_an_upload_is_never_whole_in_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 24  # MiB more for a file that is 120 MiB larger
