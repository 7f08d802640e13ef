"""What becomes of a new job: queued, or failed with the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api.database import new_id
from api.jobs.models import Job, JobStatus
from api.projects.models import Project
from api.queue import TaskName
from tests.worker.support import BASE_MODEL, Service, chat_rows
from uora.data import DatasetReport
from uora.spec import LoraSpec, TrainingOptions, TrainingSpec, UoraSpec
from worker import validation
from worker.context import Resources
from worker.validation import validate

GOOD = chat_rows(4)
USER = {"role": "user", "content": "hello"}


def line(*messages: dict[str, object]) -> bytes:
    return json.dumps({"messages": messages}).encode() + b"\n"


TOO_LONG = line(USER, {"role": "assistant", "content": "x" * 3000})
OTHER = line(USER, {"role": "assistant", "content": "good evening"})


@pytest.fixture
def held(service: Service, tiny_model: Path) -> Resources:
    return service.resources(base_models={BASE_MODEL: f"path:{tiny_model}"})


def refused(service: Service, held: Resources, job_id: str) -> Job:
    """Validate and expect a failure that left nothing half-done."""
    validate(held, job_id)
    job = service.job(job_id)
    assert job.status == "failed"
    assert job.finished_at is not None
    assert job.training_spec is None
    assert service.queue.sent == []
    assert job.error is not None
    assert service.messages(job_id)[-1] == f"The job failed: {job.error['message']}"
    return job


def test_good_files_are_queued(service: Service, held: Resources) -> None:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, rows=5, n_epochs=3, validation=GOOD)

    validate(held, job_id)

    job = service.job(job_id)
    assert (job.status, job.error) == ("queued", None)
    spec = TrainingSpec.model_validate(job.training_spec)
    assert spec.total_steps(5) == 9
    assert (spec.adapter.r, spec.learning_rate, spec.seed) == (4, 0.01, 1)
    assert service.queue.sent == [(TaskName.TRAIN, job_id)]
    first, *counts, last = service.messages(job_id)
    assert first == f"Validating training file: {job.training_file} and validation file: {job.validation_file}"
    assert len(counts) == 2
    assert last == "Files validated, moving job to queued state"


def test_jobs_of_one_shape_have_one_key(service: Service, held: Resources) -> None:
    settings = service.resources(
        base_models={**held.settings.base_models, "tiny too": held.settings.base_models["tiny"]}
    )
    lora = LoraSpec(r=4).model_dump(mode="json")
    same, paused, rank, base, alone = (
        service.add_job(status=JobStatus.VALIDATING_FILES, **values)
        for values in (
            {"n_epochs": 3},
            {"pause_requested": True},
            {"adapter": UoraSpec(r=8).model_dump(mode="json")},
            {"base_model": "tiny too"},
            {"adapter": lora},
        )
    )
    for job_id in (same, paused, rank, base, alone):
        validate(settings, job_id)

    keys = {job_id: service.job(job_id).cotraining_key for job_id in (same, paused, rank, base, alone)}
    assert keys[same] == keys[paused]
    assert len({keys[same], keys[rank], keys[base]}) == 3
    assert keys[same] is not None
    assert keys[alone] is None


@pytest.mark.parametrize(("checkpointing", "alone"), [("auto", True), (False, False)])
def test_long_rows_whose_activations_are_not_kept_have_no_key(
    service: Service, held: Resources, monkeypatch: pytest.MonkeyPatch, checkpointing: Any, alone: bool
) -> None:
    monkeypatch.setattr("uora.training.trainer.MAX_KEPT_ROW_TOKENS", 10)
    options = TrainingOptions(gradient_checkpointing=checkpointing)
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, training_options=options)
    validate(held, job_id)

    assert (service.job(job_id).cotraining_key is None) == alone


def test_auto_is_resolved_from_the_rows(service: Service, held: Resources) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, rows=32, hyperparameters=auto)

    validate(held, job_id)

    hyperparameters = TrainingSpec.model_validate(service.job(job_id).training_spec).hyperparameters
    assert (hyperparameters.batch_size, hyperparameters.n_epochs) == (4, 8)


def test_task_and_options_are_the_jobs(service: Service, held: Resources) -> None:
    rows = b'{"prompt": "hello", "completion": " hi"}\n' * 4
    options = TrainingOptions(warmup_ratio=0.1, save_steps=3)
    job_id = service.add_job(
        status=JobStatus.VALIDATING_FILES, training=rows, task="completion", options=options.model_dump(mode="json")
    )
    validate(held, job_id)

    spec = TrainingSpec.model_validate(service.job(job_id).training_spec)
    assert (spec.task, spec.options) == ("completion", options)


def test_the_base_of_a_tuned_model_is_what_rows_must_fit(service: Service, held: Resources) -> None:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, model=f"ft:{BASE_MODEL}:acme::12345678")
    validate(held, job_id)
    assert service.job(job_id).status == "queued"


def test_a_pause_during_validation_is_remembered(service: Service, held: Resources) -> None:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, pause_requested=True)
    validate(held, job_id)

    job = service.job(job_id)
    assert (job.status, job.pause_requested) == ("paused", False)
    assert job.training_spec is not None
    assert service.queue.sent == []
    assert service.messages(job_id)[-1] == "Files validated; the job is paused"


def test_what_is_found_in_the_files_is_stored_and_told(service: Service, held: Resources) -> None:
    rows = chat_rows(5) + chat_rows(1)
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, training=rows, validation=chat_rows(2) + OTHER)
    validate(held, job_id)

    stored = service.job(job_id).dataset_report
    assert stored is not None
    training, validation = (DatasetReport.model_validate(stored[name]) for name in ("training", "validation"))
    assert (training.rows_usable, training.duplicates.locations, training.leak) == (6, ("Line 6",), None)
    assert 0 < training.learned_tokens < training.tokens
    assert training.estimate is not None
    assert training.estimate.tokens == training.tokens  # of one epoch
    assert (validation.rows_usable, validation.leak) == (3, 2)
    messages = service.messages(job_id)
    assert (
        f"The training file has 6 rows of {training.tokens} tokens, {training.learned_tokens} of them learned; 0 rows "
        "are cut, 0 left out, 1 duplicates" in messages
    )
    assert any(message.endswith("0 duplicates, 2 also in the training file") for message in messages)


def test_rows_that_are_too_long_are_left_out_where_the_job_says_so(service: Service, held: Resources) -> None:
    options = TrainingOptions(overlong="drop").model_dump(mode="json")
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, training=GOOD + TOO_LONG, options=options)
    validate(held, job_id)
    job = service.job(job_id)
    assert job.status == "queued"
    assert job.dataset_report is not None
    assert (job.dataset_report["training"]["rows_usable"], job.dataset_report["training"]["rows_dropped"]) == (4, 1)


def test_all_problems_are_stored_on_the_failed_job(service: Service, held: Resources) -> None:
    bad = GOOD + line(USER) + b"{\n" + TOO_LONG
    job = refused(service, held, service.add_job(status=JobStatus.VALIDATING_FILES, training=bad, validation=bad))
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("no_assistant_message", "training_file")
    assert job.dataset_report is not None
    for name in ("training", "validation"):
        problems = DatasetReport.model_validate(job.dataset_report[name]).problems
        assert [(problem.location, problem.code) for problem in problems] == [
            ("Line 5", "no_assistant_message"),
            ("Line 6", "invalid_json"),
            ("Line 7", "example_too_long"),
        ]


def test_a_repeated_message_changes_nothing(service: Service, held: Resources) -> None:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES)
    validate(held, job_id)
    before = service.messages(job_id)
    service.queue.take()

    validate(held, job_id)

    assert service.messages(job_id) == before
    assert service.queue.sent == []


def test_a_lost_race_changes_nothing(service: Service, held: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES)
    check = validation._check

    def check_while_the_user_cancels(held: Resources, job: Job) -> validation.Checked:
        service.update(job_id, status=JobStatus.CANCELLED)
        return check(held, job)

    monkeypatch.setattr(validation, "_check", check_while_the_user_cancels)
    validate(held, job_id)

    assert service.job(job_id).status == "cancelled"
    assert service.queue.sent == []
    assert len(service.messages(job_id)) == 1


BAD_FILES = {
    "not JSON": (b'{"messages": [\n', "Line 5", "invalid_json"),
    "not UTF-8": (b'{"messages": "\xff"}\n', "Line 5", "invalid_encoding"),
    "no assistant": (line(USER), "Line 5", "no_assistant_message"),
    "unknown role": (line({"role": "robot", "content": "hi"}), "Line 5", "unknown_role"),
    "too long": (TOO_LONG, "Line 5", "example_too_long"),
}


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
@pytest.mark.parametrize(("bad", "where", "code"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_row_names_its_line_and_file(
    service: Service, held: Resources, param: str, bad: bytes, where: str, code: str
) -> None:
    files = {"training": GOOD, "validation": GOOD} | {param.removesuffix("_file"): GOOD + bad}
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, **files)

    error = refused(service, held, job_id).error

    assert error is not None
    assert error["message"].startswith(where)
    assert (error["code"], error["param"]) == (code, param)


def test_an_empty_file(service: Service, held: Resources) -> None:
    error = refused(service, held, service.add_job(status=JobStatus.VALIDATING_FILES, training=b"\n\n")).error
    assert error is not None
    assert (error["code"], error["param"]) == ("empty_file", "training_file")


def test_a_file_whose_bytes_are_gone(service: Service, held: Resources) -> None:
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, validation=GOOD)
    service.storage.delete(str(service.job(job_id).validation_file))

    error = refused(service, held, job_id).error
    assert error is not None
    assert (error["code"], error["param"]) == ("file_not_found", "validation_file")


def test_a_file_of_another_project(service: Service, held: Resources) -> None:
    with service.sessions.begin() as session:
        other = Project(id=new_id("proj_"), name="Other", slug="other")
        session.add(other)
    foreign = service.add_file(GOOD, project_id=other.id)
    job_id = service.add_job(status=JobStatus.VALIDATING_FILES, training_file=foreign)

    error = refused(service, held, job_id).error
    assert error is not None
    assert (error["code"], error["param"]) == ("file_not_found", "training_file")


def test_a_base_model_that_cannot_be_had(service: Service) -> None:
    secret_place = "/secret/place"
    held = service.resources(base_models={BASE_MODEL: f"path:{secret_place}"})

    error = refused(service, held, service.add_job(status=JobStatus.VALIDATING_FILES)).error

    assert error is not None
    assert (error["code"], error["param"]) == ("base_model_unavailable", "model")
    assert secret_place not in error["message"]


def test_a_base_model_that_is_no_longer_offered(service: Service) -> None:
    held = service.resources(base_models={})
    error = refused(service, held, service.add_job(status=JobStatus.VALIDATING_FILES)).error
    assert error is not None
    assert error["code"] == "base_model_unavailable"


def test_an_unknown_error_is_hidden_and_ends_the_job(
    service: Service, held: Resources, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ValueError("password=hunter2")

    monkeypatch.setattr(validation, "resolve", explode)
    error = refused(service, held, service.add_job(status=JobStatus.VALIDATING_FILES)).error

    assert error is not None
    assert error["code"] == "internal_error"
    assert "hunter2" not in json.dumps(error)
    assert "hunter2" in caplog.text


def test_a_database_error_leaves_the_job_for_the_sweeper(
    service: Service, held: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_connection(*_: object, **__: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    job_id = service.add_job(status=JobStatus.VALIDATING_FILES)
    monkeypatch.setattr(validation, "_check", lose_connection)

    with pytest.raises(OperationalError):
        validate(held, job_id)
    assert service.job(job_id).status == "validating_files"
