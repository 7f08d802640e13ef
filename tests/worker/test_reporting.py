"""Reports that clients ask for, made by a worker."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from api.database import now
from api.files.models import File, FileStatus
from api.files.repository import mark_deleted
from api.jobs.models import JobStatus
from api.queue import TaskName
from api.reports.models import FileReport, ReportStatus
from api.reports.repository import claim, new_report
from api.reports.schemas import ReportRequest
from tests.worker.support import BASE_MODEL, Service, chat_rows
from uora.data import DatasetReport
from uora.spec import LoraSpec, UoraSpec
from worker import reporting
from worker.context import Resources
from worker.reporting import LEASE_TTL, MAX_ATTEMPTS, make_report
from worker.sweeping import sweep
from worker.validation import validate

GOOD = chat_rows(8)
BAD = GOOD + json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode() + b"\n"
FOR_MODEL = ReportRequest(base_model=BASE_MODEL, task="chat")


@pytest.fixture
def held(any_service: Service, tiny_model: Path) -> Resources:
    return any_service.resources(base_models={BASE_MODEL: f"path:{tiny_model}"})


def ask(service: Service, file_id: str, request: ReportRequest, **values: Any) -> str:
    row = new_report(service.project.id, file_id, request)
    for name, value in values.items():
        setattr(row, name, value)
    with service.sessions.begin() as session:
        session.add(row)
    return row.id


def row(service: Service, report_id: str) -> FileReport:
    with service.sessions() as session:
        return session.execute(select(FileReport).where(FileReport.id == report_id)).scalar_one()


def file(service: Service, file_id: str) -> File:
    with service.sessions() as session:
        return session.execute(select(File).where(File.id == file_id)).scalar_one()


@pytest.mark.parametrize(("content", "status"), [(GOOD, FileStatus.PROCESSED), (BAD, FileStatus.ERROR)])
def test_a_file_is_checked_without_a_model(any_service: Service, content: bytes, status: FileStatus) -> None:
    file_id = any_service.add_file(content)
    report_id = ask(any_service, file_id, ReportRequest())

    make_report(any_service.resources(), report_id)

    assert row(any_service, report_id).status == ReportStatus.COMPLETED
    checked = file(any_service, file_id)
    assert checked.status == status
    assert (checked.status_details or "").startswith("Line 9: ") == (status is FileStatus.ERROR)


def test_a_report_is_what_the_jobs_validation_finds(any_service: Service, held: Resources) -> None:
    job_id = any_service.add_job(status=JobStatus.VALIDATING_FILES, training=GOOD, validation=GOOD)
    validate(held, job_id)
    job = any_service.job(job_id)
    assert job.dataset_report is not None
    with_adapter = FOR_MODEL.model_copy(update={"adapter": job.adapter})
    beside = FOR_MODEL.model_copy(update={"training_file": job.training_file})
    asked = {
        "training": ask(any_service, job.training_file, with_adapter),
        "validation": ask(any_service, str(job.validation_file), beside),
    }
    for name, report_id in asked.items():
        make_report(held, report_id)
        found = DatasetReport.model_validate(row(any_service, report_id).report)
        expected = DatasetReport.model_validate(job.dataset_report[name])
        without = {"previews": (), "estimate": None}
        assert found.model_copy(update=without) == expected.model_copy(update=without)
        assert found.previews[:1] == expected.previews
        assert len(found.previews) == 3
        assert file(any_service, row(any_service, report_id).file_id).status == FileStatus.PROCESSED


def test_the_footprint_is_of_the_adapter_that_was_asked_for(
    any_service: Service, held: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = any_service.add_file(GOOD)
    make_report(held, ask(any_service, file_id, FOR_MODEL))
    monkeypatch.setattr(reporting, "_read", lambda *_: pytest.fail("the rows were read before"))
    found = {}
    for spec in (UoraSpec(r=4), LoraSpec(r=4)):
        request = FOR_MODEL.model_copy(update={"adapter": spec.model_dump(mode="json")})
        report_id = ask(any_service, file_id, request)
        make_report(held, report_id)
        found[spec.method] = row(any_service, report_id).footprint
    uora, lora = found["uora"], found["lora"]
    assert uora is not None
    assert lora is not None
    # Two layers of q, k, v, o, gate, up and down of 48 and 96: r + out each; r (in + out) for LoRA (see test_cli).
    sizes = 2 * [(48, 48), (48, 24), (48, 24), (48, 48), (48, 96), (48, 96), (96, 48)]
    assert uora["trainable_parameters"] == sum(4 + size_out for _, size_out in sizes)
    assert lora["trainable_parameters"] == sum(4 * (size_in + size_out) for size_in, size_out in sizes)
    assert lora["adapter_bytes"] > 4 * lora["trainable_parameters"]


def test_a_file_that_nobody_can_read_is_said(any_service: Service, held: Resources) -> None:
    file_id = any_service.add_file(GOOD)
    unknown = ask(any_service, file_id, ReportRequest(base_model="gone", task="chat"))
    make_report(held, unknown)
    error = row(any_service, unknown).error
    assert error is not None
    assert error["code"] == "base_model_unavailable"
    assert file(any_service, file_id).status == FileStatus.PROCESSED  # that says nothing of the file

    any_service.storage.delete(file_id)
    lost = ask(any_service, file_id, ReportRequest())
    make_report(held, lost)
    assert row(any_service, lost).status == ReportStatus.FAILED
    assert file(any_service, file_id).status == FileStatus.ERROR


def test_one_worker_makes_it(any_service: Service) -> None:
    report_id = ask(any_service, any_service.add_file(GOOD), ReportRequest())
    with any_service.sessions.begin() as session:
        first = claim(session, report_id, ttl=LEASE_TTL)
    assert first is not None
    make_report(any_service.resources(), report_id)  # does nothing: another has it
    assert row(any_service, report_id).status == ReportStatus.QUEUED
    sweep(any_service.resources())
    assert any_service.queue.sent == []

    with any_service.sessions.begin() as session:  # it vanished
        session.execute(select(FileReport)).scalar_one().lease_until = now() - timedelta(seconds=1)
        session.execute(select(FileReport)).scalar_one().created_at = now() - timedelta(minutes=5)
    sweep(any_service.resources())
    assert any_service.queue.sent == [(TaskName.REPORT, report_id)]
    make_report(any_service.resources(), report_id)
    assert row(any_service, report_id).status == ReportStatus.COMPLETED
    with any_service.sessions.begin() as session:
        reporting.finish(session, first, status=ReportStatus.FAILED)  # the first one comes back late
    assert row(any_service, report_id).status == ReportStatus.COMPLETED


def test_a_file_that_kills_its_readers_is_given_up(any_service: Service) -> None:
    file_id = any_service.add_file(GOOD)
    report_id = ask(any_service, file_id, ReportRequest(), attempt=MAX_ATTEMPTS)
    make_report(any_service.resources(), report_id)
    assert row(any_service, report_id).status == ReportStatus.FAILED
    assert file(any_service, file_id).status == FileStatus.ERROR


def test_a_file_that_is_deleted_meanwhile_is_no_error(any_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = any_service.add_file(GOOD)
    report_id = ask(any_service, file_id, ReportRequest())
    made = reporting._make

    def delete_and_make(*arguments: Any) -> Any:
        found = made(*arguments)
        with any_service.sessions.begin() as session:
            mark_deleted(session, session.execute(select(File).where(File.id == file_id)).scalar_one())
        return found

    monkeypatch.setattr(reporting, "_make", delete_and_make)
    make_report(any_service.resources(), report_id)
    with any_service.sessions() as session:
        assert session.scalar(select(FileReport.id)) is None
