"""What is said about a file at its upload, for a model, and about a job before there is one."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import openai
import pytest
from openai import OpenAI

from api.database import now
from api.files.models import File
from api.queue import TaskName
from api.reports.models import FileReport, ReportStatus
from api.reports.schemas import ReportRequest
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service
from uora.data import DatasetReport
from uora.estimate import Footprint, Sizes, measured_costs

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
BAD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}\n'
FOOTPRINT = Footprint(
    sizes=Sizes(
        linear_parameters=10**6,
        linear_features=10**4,
        adapted_features=10**4,
        adapted_layers=14,
        adapter_numbers=10**5,
        vocabulary=1000,
        hidden=64,
    ),
    tokens_at_once=4096,
    trainable_parameters=1234,
    adapter_bytes=5678,
)


def upload(client: OpenAI, content: bytes) -> str:
    return client.files.create(file=content, purpose="fine-tune").id


def report(service: Service, file_id: str, **query: Any) -> tuple[int, dict[str, Any]]:
    answer = service.http().get(f"/v1/files/{file_id}/report", params=query)
    return answer.status_code, answer.json()


def test_errors_are_there_with_the_upload(service: Service, client: OpenAI) -> None:
    created = client.files.create(file=GOOD + BAD + GOOD + b"{\n", purpose="fine-tune")
    assert created.status == "error"
    assert created.status_details == (
        "2 problems, the first: Line 2: the content of messages[1] is empty; expected text."
    )
    assert client.files.wait_for_processing(created.id).status == "error"
    status, told = report(service, created.id)
    assert (status, told["status"], told["model"]) == (200, "completed", None)
    found = told["report"]
    assert [problem["location"] for problem in found["problems"]] == ["Line 2", "Line 4"]
    assert (found["rows_read"], found["rows_usable"], found["duplicates"]["count"]) == (4, 2, 1)
    assert not {"tokens", "previews"} & found.keys()  # nobody has named a model
    assert service.queue.messages == []


def test_a_good_file_is_processed_at_once(client: OpenAI) -> None:
    created = client.files.create(file=GOOD, purpose="fine-tune")
    assert (created.status, created.status_details) == ("processed", None)


def test_a_validation_file_may_have_one_class(client: OpenAI) -> None:
    assert client.files.create(file=b'{"text": "a", "label": "x"}\n', purpose="fine-tune").status == "processed"


def test_another_kind_of_file_is_looked_into_by_a_worker(service: Service, client: OpenAI) -> None:
    created = client.files.create(file=b"PAR1" + b"x" * 100, purpose="fine-tune")
    assert created.status == "uploaded"
    (task, report_id), *rest = service.queue.messages
    assert (task, rest) == (TaskName.REPORT, [])
    status, told = report(service, created.id)
    assert (status, told["status"], told["report"]) == (202, "in_progress", None)
    with service.sessions() as session:
        assert session.query(FileReport).filter_by(id=report_id).one().file_id == created.id
    assert len(service.queue.messages) == 1  # it has been rung for


def test_so_is_a_large_file(service: Service, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.files.service.CHECKED_AT_ONCE_BYTES", len(GOOD))
    assert client.files.create(file=GOOD, purpose="fine-tune").status == "processed"
    assert client.files.create(file=GOOD + GOOD, purpose="fine-tune").status == "uploaded"


def test_a_report_for_a_model_is_made_once(service: Service, client: OpenAI) -> None:
    file_id = upload(client, GOOD)
    for _ in range(2):
        status, told = report(service, file_id, model="tiny", max_length=100)
        assert (status, told["status"], told["model"]) == (202, "in_progress", "tiny")
    assert len(service.queue.messages) == 1
    report(service, file_id, model="tiny", max_length=50)
    assert len(service.queue.messages) == 2
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant)
        model = add_adapter(session, service.tenant, job).id
    status, told = report(service, file_id, model=model, max_length=50)  # its base model's tokens
    assert (told["model"], len(service.queue.messages)) == ("tiny", 2)


def complete(service: Service, **values: Any) -> None:
    """What a worker would write."""
    with service.sessions.begin() as session:
        for row in session.query(FileReport).filter_by(project_id=service.tenant.project_id):
            if row.request["base_model"]:
                row.status, row.finished_at = ReportStatus.COMPLETED, now()
                row.report = made(**values).model_dump(mode="json")
                row.footprint = asdict(FOOTPRINT) if row.request["adapter"] else None


def made(**values: Any) -> DatasetReport:
    whole = {
        "sha256": "0" * 64,
        "container": "jsonl",
        "row_format": "messages",
        "task": "chat",
        "trainable": True,
        "rows_read": 32,
        "rows_usable": 32,
        "rows_truncated": 0,
        "rows_dropped": 0,
        "tokens": 3200,
        "learned_tokens": 1600,
        "lengths": None,
        "duplicates": {"count": 0, "locations": []},
        "leak": None,
        "labels": None,
        "label_count": 0,
        "numbers": None,
        "problems": [],
        "problem_count": 0,
        "previews": [],
    }
    return DatasetReport.model_validate(whole | values)


def estimate(service: Service, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = service.http().post("/v1/fine_tuning/estimate", json={"model": "tiny"} | body)
    return answer.status_code, answer.json()


def test_an_estimate_is_of_the_job_that_would_be(service: Service, client: OpenAI) -> None:
    training, validation = upload(client, GOOD), upload(client, GOOD + GOOD)
    body = {"training_file": training, "validation_file": validation, "peft": {"r": 8}}
    status, told = estimate(service, **body)
    assert (status, told["status"], told["trainable"]) == (202, "in_progress", None)
    assert [task for task, _ in service.queue.messages] == [TaskName.REPORT] * 2
    assert estimate(service, **body)[0] == 202
    assert len(service.queue.messages) == 2
    complete(service)
    status, told = estimate(service, **body)
    assert (status, told["status"], told["trainable"], told["error"]) == (200, "completed", True, None)
    # 32 rows make batches of 4 and, of about 60 steps, 8 epochs (uora.spec.resolve).
    assert told["hyperparameters"] == {"n_epochs": 8, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert (told["steps"], told["tokens"], told["adapter"]["r"]) == (64, 25_600, 8)
    assert (told["trainable_parameters"], told["adapter_bytes"]) == (1234, 5678)
    assert told["training"] == {
        "file": training,
        "rows": 32,
        "tokens": 3200,
        "learned_tokens": 1600,
        "problem_count": 0,
    }
    assert told["validation"]["file"] == validation
    assert told["seconds"] > 0
    assert told["memory_bytes"] > 0
    assert told["machine"] == measured_costs().machine  # type: ignore[union-attr]  # they are in the package
    assert told["cost"] == 0
    # What is only calculated needs no worker again.
    longer = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 16}}}}
    twice = estimate(service, **body, **longer)[1]
    assert twice["seconds"] == pytest.approx(2 * told["seconds"])
    assert len(service.queue.messages) == 2
    assert list(client.fine_tuning.jobs.list()) == []


def test_an_estimate_has_a_price(service: Service, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"training_file": upload(client, GOOD)}
    estimate(service, **body)
    complete(service)
    monkeypatch.setattr(service.settings, "price_per_second", 0.5)
    monkeypatch.setattr(service.settings, "price_per_thousand_tokens", 2.0)
    told = estimate(service, **body)[1]
    assert told["cost"] == pytest.approx(0.5 * told["seconds"] + 2.0 * told["tokens"] / 1000)


def test_an_estimate_says_what_a_job_would_fail_of(service: Service, client: OpenAI) -> None:
    body = {"training_file": upload(client, GOOD)}
    estimate(service, **body)
    problem = {"code": "example_too_long", "message": "the row is too long", "location": "Line 7"}
    complete(service, trainable=False, problems=[problem], problem_count=3)
    status, told = estimate(service, **body)
    assert (status, told["trainable"], told["seconds"], told["training"]["problem_count"]) == (200, False, None, 3)
    expected = {"code": "example_too_long", "message": "Line 7: the row is too long", "param": "training_file"}
    assert told["error"] == expected


def test_the_official_client_can_ask(service: Service, client: OpenAI) -> None:
    training = upload(client, GOOD)
    body = {"model": "tiny", "training_file": training}
    assert client.post("/fine_tuning/estimate", body=body, cast_to=dict[str, Any])["status"] == "in_progress"
    complete(service)
    assert client.post("/fine_tuning/estimate", body=body, cast_to=dict[str, Any])["steps"] == 64
    told = client.get(f"/files/{training}/report?model=tiny&task=chat", cast_to=dict[str, Any])
    assert (told["object"], told["status"]) == ("file.report", "completed")  # the estimate's own


def test_a_failed_report_is_told_and_tried_again_later(service: Service, client: OpenAI) -> None:
    file_id = upload(client, GOOD)
    body = {"training_file": file_id}
    estimate(service, **body)
    error = {"code": "base_model_unavailable", "message": "It could not be loaded.", "param": "model"}
    with service.sessions.begin() as session:
        row = session.query(FileReport).filter_by(file_id=file_id, status=ReportStatus.QUEUED).one()
        row.status, row.error, row.finished_at = ReportStatus.FAILED, error, now()
    status, told = estimate(service, **body)
    assert (status, told["status"], told["error"]) == (200, "failed", error)
    assert len(service.queue.messages) == 1
    with service.sessions.begin() as session:
        session.query(FileReport).filter_by(id=row.id).one().finished_at = now() - timedelta(minutes=1)
    assert estimate(service, **body)[0] == 202
    assert len(service.queue.messages) == 2


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ({"model": "none"}, 404, "model"),
        ({"max_length": 100}, 400, "model"),
        ({"model": "tiny", "training_file": "file-none"}, 404, "training_file"),
        ({"task": "singing"}, 400, "task"),
    ],
)
def test_a_question_that_cannot_be_answered(
    service: Service, client: OpenAI, query: dict[str, Any], status: int, param: str
) -> None:
    found, told = report(service, upload(client, GOOD), **query)
    assert (found, told["error"]["param"]) == (status, param)
    assert service.queue.messages == []


def test_only_training_files_are_looked_into(service: Service, client: OpenAI) -> None:
    file = client.files.create(file=b"?", purpose="user_data")
    assert file.status == "processed"
    assert report(service, file.id)[1]["error"]["code"] == "invalid_file_purpose"


def test_a_file_from_before_is_looked_into_when_asked(service: Service) -> None:
    with service.sessions.begin() as session:
        file_id = add_file(session, service.tenant).id
    assert report(service, file_id)[0] == 202
    assert [task for task, _ in service.queue.messages] == [TaskName.REPORT]


def test_what_was_found_goes_with_the_file(service: Service, client: OpenAI) -> None:
    file_id = upload(client, GOOD)
    client.files.delete(file_id)
    with service.sessions() as session:
        assert session.query(FileReport).filter_by(file_id=file_id).count() == 0
        assert session.query(File).filter_by(id=file_id).one().deleted_at
    with pytest.raises(openai.NotFoundError):
        client.get(f"/files/{file_id}/report", cast_to=dict[str, Any])


def test_equal_requests_have_equal_keys() -> None:
    one = ReportRequest(base_model="tiny", task="chat", adapter={"r": 8})
    assert one.key == ReportRequest.model_validate(json.loads(one.model_dump_json())).key
    assert one.key != one.rows.key == ReportRequest(base_model="tiny", task="chat").key
