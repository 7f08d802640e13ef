"""Files in parts, through the official client."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from api.database import now
from api.files.models import File
from api.uploads.models import Upload, UploadPart
from tests.api.support import Service

ROW = b'{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "ho"}]}\n'
ROWS = b"".join(ROW % number for number in range(99))
MD5 = hashlib.md5(ROWS, usedforsecurity=False).hexdigest()
ANNOUNCED: dict[str, Any] = {"filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}


def announce(client: OpenAI, size: int = 6, **values: Any) -> str:
    return client.uploads.create(bytes=size, **ANNOUNCED | values).id


def test_the_client_sends_a_file_in_pieces(service: Service, client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=1000, md5=MD5
    )
    assert (upload.status, upload.bytes, upload.filename) == ("completed", len(ROWS), "rows.jsonl")
    assert upload.file is not None
    assert (upload.file.bytes, upload.file.status, upload.file.purpose) == (len(ROWS), "processed", "fine-tune")
    assert client.files.content(upload.file.id).read() == ROWS
    assert service.stored_files() == [upload.file.id]  # the parts are gone
    with service.sessions() as session:
        file = session.query(File).filter_by(id=upload.file.id).one()
        assert file.sha256 == hashlib.sha256(ROWS).hexdigest()


def test_parts_are_put_in_the_named_order(client: OpenAI) -> None:
    upload = announce(client, purpose="user_data")
    last = client.uploads.parts.create(upload, data=b"def")
    first = client.uploads.parts.create(upload, data=b"abc")
    assert (first.object, first.upload_id) == ("upload.part", upload)
    done = client.uploads.complete(upload, part_ids=[first.id, last.id])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"abcdef"
    again = client.uploads.complete(upload, part_ids=[first.id, last.id])  # whoever did not get the answer asks twice
    assert again == done


def test_a_file_of_an_upload_expires_too(client: OpenAI) -> None:
    upload = announce(client, expires_after={"anchor": "created_at", "seconds": 3600})
    part = client.uploads.parts.create(upload, data=b"abcdef")
    file = client.uploads.complete(upload, part_ids=[part.id]).file
    assert file is not None
    assert file.expires_at == file.created_at + 3600


def test_what_does_not_fit_is_refused(service: Service, client: OpenAI) -> None:
    upload = announce(client)
    part = client.uploads.parts.create(upload, data=b"abcd").id
    other = client.uploads.parts.create(announce(client), data=b"abc").id
    for part_ids, param in (([part], "part_ids"), ([part, part], "part_ids"), ([part, other], "part_ids")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload, part_ids=part_ids)
        assert caught.value.param == param
    for data in (b"efg", b""):
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.parts.create(upload, data=data)
        assert caught.value.param == "data"
    rest = client.uploads.parts.create(upload, data=b"ef").id
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload, part_ids=[part, rest], md5="0" * 32)
    assert (caught.value.param, caught.value.code) == ("md5", "checksum_mismatch")
    assert service.stored_files() == sorted([part, other, rest])
    assert client.uploads.complete(upload, part_ids=[part, rest]).status == "completed"


def test_sizes_have_limits(service: Service, client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        announce(client, service.settings.max_large_upload_bytes + 1)
    assert caught.value.status_code == 413
    limit = service.settings.max_part_bytes
    upload = announce(client, 3 * limit)
    for size in (limit + 1, limit + 100_000):  # over the store's limit, and over that of the body
        with pytest.raises(openai.APIStatusError) as caught:
            client.uploads.parts.create(upload, data=b"x" * size)
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    assert service.stored_files() == []


def test_a_cancelled_upload_keeps_nothing(service: Service, client: OpenAI) -> None:
    upload = announce(client)
    part = client.uploads.parts.create(upload, data=b"abc")
    for _ in range(2):
        assert client.uploads.cancel(upload).status == "cancelled"
    assert service.stored_files() == []
    for call in (
        lambda: client.uploads.parts.create(upload, data=b"abc"),
        lambda: client.uploads.complete(upload, part_ids=[part.id]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "upload_not_pending"
    with service.sessions() as session:
        assert session.query(UploadPart).filter_by(upload_id=upload).count() == 0


def test_a_completed_upload_cannot_be_cancelled(client: OpenAI) -> None:
    upload = announce(client)
    part = client.uploads.parts.create(upload, data=b"abcdef")
    client.uploads.complete(upload, part_ids=[part.id])
    with pytest.raises(openai.BadRequestError):
        client.uploads.cancel(upload)


def test_an_upload_expires_after_an_hour(service: Service, client: OpenAI) -> None:
    made = client.uploads.create(bytes=6, **ANNOUNCED)
    assert made.expires_at == made.created_at + 3600
    with service.sessions.begin() as session:
        session.query(Upload).filter_by(id=made.id).one().expires_at = now() - timedelta(seconds=1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.parts.create(made.id, data=b"abc")
    assert "expired" in caught.value.message


def test_a_part_for_nobodys_upload_is_refused_before_it_is_read(service: Service) -> None:
    answer = service.http().post(
        "/v1/uploads/upload_none/parts",
        headers={"content-type": "multipart/form-data; boundary=x"},
        content=b"this is not even a form",
    )
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "upload_not_found"
