"""Pausing, resuming, starting from a fine-tuned model and promoting a checkpoint, through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from api.jobs.models import Job, JobStatus, TrainingState
from api.models.models import Adapter
from api.queue import TaskName
from tests.api.rows import add_adapter, add_file, add_job, add_state
from tests.api.support import Service
from uora.spec import LoraSpec, TrainingOptions, UoraSpec


def stored_job(service: Service, job_id: str) -> Job:
    """The row."""
    with service.sessions() as session:
        return session.query(Job).filter_by(id=job_id).one()


def states(service: Service, job_id: str) -> int:
    """How many are kept of the job."""
    with service.sessions() as session:
        return session.query(TrainingState).filter_by(job_id=job_id).count()


def messages(client: OpenAI, job_id: str) -> list[str]:
    """The job's log, oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id)][::-1]


def put_job(service: Service, *, state: bool = False, **values: Any) -> str:
    """A job over two files."""
    with service.sessions.begin() as session:
        files = [add_file(session, service.tenant).id for _ in range(2)]
        job = add_job(session, service.tenant, training_file=files[0], validation_file=files[1], **values)
        if state:
            add_state(session, job)
        return job.id


class TestPause:
    """POST /v1/fine_tuning/jobs/{id}/pause"""

    def test_a_queued_job_pauses_at_once(self, service: Service, client: OpenAI) -> None:
        job_id = put_job(service, status=JobStatus.QUEUED, state=True)
        for _ in range(2):  # a client repeats a request whose answer was lost
            assert client.fine_tuning.jobs.pause(job_id).status == "paused"
        assert messages(client, job_id) == ["Paused"]
        assert states(service, job_id) == 1

    @pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, JobStatus.RUNNING])
    def test_who_works_on_a_job_is_asked_once(self, service: Service, client: OpenAI, status: JobStatus) -> None:
        job_id = put_job(service, status=status)
        for _ in range(2):
            assert client.fine_tuning.jobs.pause(job_id).status == status
        assert stored_job(service, job_id).pause_requested
        assert messages(client, job_id) == ["Pause requested"]

    @pytest.mark.parametrize(
        "values",
        [
            {"status": JobStatus.SUCCEEDED},
            {"status": JobStatus.FAILED},
            {"status": JobStatus.CANCELLED},
            {"status": JobStatus.RUNNING, "cancel_requested": True},
        ],
    )
    def test_other_jobs_stay_as_they_are(self, service: Service, values: dict[str, Any]) -> None:
        job_id = put_job(service, **values)
        with pytest.raises(openai.BadRequestError) as caught:
            service.client(max_retries=2).fine_tuning.jobs.pause(job_id)
        assert caught.value.code == "job_not_pausable"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.request.headers["x-stainless-retry-count"] == "0"
        assert not stored_job(service, job_id).pause_requested

    def test_a_paused_job_can_be_cancelled(self, service: Service, client: OpenAI) -> None:
        job_id = put_job(service, status=JobStatus.PAUSED, state=True)
        assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
        assert states(service, job_id) == 0

    def test_its_files_are_still_needed(self, service: Service, client: OpenAI) -> None:
        job_id = put_job(service, status=JobStatus.PAUSED)
        with pytest.raises(openai.ConflictError):
            client.files.delete(stored_job(service, job_id).training_file)


class TestResume:
    """POST /v1/fine_tuning/jobs/{id}/resume"""

    def test_a_paused_job_is_queued(self, service: Service, client: OpenAI) -> None:
        job_id = put_job(service, status=JobStatus.PAUSED, state=True, cotraining_key="key")
        assert client.fine_tuning.jobs.resume(job_id).status == "queued"
        assert service.queue.messages == [(TaskName.TRAIN, job_id)]
        assert states(service, job_id) == 1
        assert stored_job(service, job_id).cotraining_key == "key"

    def test_a_failed_job_goes_on_from_its_state(self, service: Service, client: OpenAI) -> None:
        error = {"code": "out_of_memory_or_killed", "message": "m", "param": None}
        values = {"error": error, "lost_trainers": 2, "cancel_requested": True}  # it failed before it saw the cancel
        job_id = put_job(service, status=JobStatus.FAILED, state=True, cotraining_key="key", **values)
        resumed = client.fine_tuning.jobs.resume(job_id)
        assert (resumed.status, resumed.error, resumed.finished_at) == ("queued", None, None)
        row = stored_job(service, job_id)
        assert (row.lost_trainers, row.cancel_requested, row.cotraining_key) == (0, False, None)
        assert service.queue.messages == [(TaskName.TRAIN, job_id)]

    def test_a_failed_job_needs_its_files(self, service: Service, client: OpenAI) -> None:
        job_id = put_job(service, status=JobStatus.FAILED, state=True)
        client.files.delete(str(stored_job(service, job_id).validation_file))
        with pytest.raises(openai.NotFoundError) as caught:
            client.fine_tuning.jobs.resume(job_id)
        assert (caught.value.code, caught.value.param) == ("file_not_found", "validation_file")
        assert stored_job(service, job_id).status == "failed"

    @pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, JobStatus.RUNNING])
    def test_a_pause_that_has_not_happened_is_taken_back(
        self, service: Service, client: OpenAI, status: JobStatus
    ) -> None:
        job_id = put_job(service, status=status, pause_requested=True)
        assert client.fine_tuning.jobs.resume(job_id).status == status
        assert not stored_job(service, job_id).pause_requested

    @pytest.mark.parametrize("status", [status for status in JobStatus if status != JobStatus.PAUSED])
    def test_other_jobs_stay_as_they_are(self, service: Service, status: JobStatus) -> None:
        job_id = put_job(service, status=status)
        with pytest.raises(openai.BadRequestError) as caught:
            service.client(max_retries=2).fine_tuning.jobs.resume(job_id)
        assert caught.value.code == "job_not_resumable"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.request.headers["x-stainless-retry-count"] == "0"
        assert stored_job(service, job_id).status == status
        assert service.queue.messages == []


class TestTrainingOptions:
    """``training`` and ``task`` of a new job."""

    def create(self, client: OpenAI, service: Service, **extra: Any) -> FineTuningJob:
        with service.sessions.begin() as session:
            file_id = add_file(session, service.tenant).id
        validation = {"validation_file": file_id} if extra.pop("validated", False) else {}
        return client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=extra, **validation)

    def test_they_are_kept_and_shown(self, service: Service, client: OpenAI) -> None:
        sent = {"early_stopping_patience": 3, "packing": False, "lr_scheduler_type": "cosine"}
        job = self.create(client, service, training=sent, task="classification", validated=True)
        expected = TrainingOptions(early_stopping_patience=3, packing=False, lr_scheduler_type="cosine")
        assert job.options == expected.model_dump(mode="json")  # type: ignore[attr-defined]
        assert job.task == "classification"  # type: ignore[attr-defined]
        assert (job.stopped_early, job.best_step, job.dataset_report) == (None, None, None)  # type: ignore[attr-defined]
        assert TrainingOptions.model_validate(stored_job(service, job.id).options) == expected

    def test_the_defaults(self, service: Service, client: OpenAI) -> None:
        job = self.create(client, service)
        assert job.options == TrainingOptions().model_dump(mode="json")  # type: ignore[attr-defined]
        assert job.task == "chat"  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("extra", "param", "code"),
        [
            ({"training": {"warmup": 0.1}}, "training.warmup", "unknown_parameter"),
            ({"training": {"warmup_ratio": 1.5}}, "training.warmup_ratio", "invalid_value"),
            ({"training": {"lr_scheduler_type": "step"}}, "training.lr_scheduler_type", "invalid_value"),
            (
                {"training": {"gradient_checkpointing": "perhaps"}},
                "training.gradient_checkpointing",
                "invalid_value",
            ),
            ({"training": 5}, "training", "invalid_value"),
            ({"task": "poetry"}, "task", "invalid_value"),
            ({"training": {"load_best_model_at_end": True}}, "validation_file", "missing_required_parameter"),
            ({"training": {"early_stopping_patience": 1}}, "validation_file", "missing_required_parameter"),
        ],
    )
    def test_what_is_refused(
        self, service: Service, client: OpenAI, extra: dict[str, Any], param: str, code: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            self.create(client, service, **extra)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert list(client.fine_tuning.jobs.list()) == []


class TestWarmStart:
    """``model`` is a fine-tuned model."""

    @pytest.fixture
    def lora(self, service: Service) -> Adapter:
        """A LoRA adapter of rank 4 for classification."""
        adapter = LoraSpec(r=4, targets="q,v").model_dump(mode="json")
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, adapter=adapter, task="classification")
            return add_adapter(session, service.tenant, job)

    def create(self, client: OpenAI, service: Service, model: str, **extra: Any) -> FineTuningJob:
        with service.sessions.begin() as session:
            file_id = add_file(session, service.tenant).id
        return client.fine_tuning.jobs.create(model=model, training_file=file_id, extra_body=extra)

    @pytest.mark.parametrize(
        "extra",
        [
            {},
            {"peft": {}},
            {"peft": {"learning_rate": 0.001}},
            {"peft": {"r": 4}},
            {"peft": {"method": "lora", "r": 4, "targets": "q,v", "lora_alpha": 16}},
            {"task": "classification"},
        ],
    )
    def test_the_adapter_is_that_models(
        self, service: Service, client: OpenAI, lora: Adapter, extra: dict[str, Any]
    ) -> None:
        job = self.create(client, service, lora.id, **extra)
        row = stored_job(service, job.id)
        assert (job.model, row.base_model, row.task) == (lora.id, "tiny", "classification")
        assert (row.warm_start, row.warm_start_digest) == (lora.id, lora.digest)
        assert row.adapter == LoraSpec(r=4, targets="q,v").model_dump(mode="json")

    @pytest.mark.parametrize(
        ("extra", "param", "found", "has"),
        [
            ({"peft": {"r": 8}}, "peft.r", "8", "4"),
            ({"peft": {"method": "uora"}}, "peft.method", "'uora'", "'lora'"),
            ({"peft": {"method": "lora", "targets": ["k_proj"]}}, "peft.targets", "['k_proj']", "'q,v'"),
            ({"peft": {"alpha": 0.25}}, "peft.alpha", "0.25", "None"),
            ({"task": "chat"}, "task", "'chat'", "'classification'"),
        ],
    )
    def test_other_settings_are_refused_by_both_values(
        self, service: Service, client: OpenAI, lora: Adapter, extra: dict[str, Any], param: str, found: str, has: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            self.create(client, service, lora.id, **extra)
        assert caught.value.param == param
        assert found in caught.value.message
        assert has in caught.value.message

    def test_how_it_goes_on_may_be_said_anew(self, service: Service, client: OpenAI, lora: Adapter) -> None:
        job = self.create(client, service, lora.id, peft={"dropout": 0.25})
        assert stored_job(service, job.id).adapter["dropout"] == 0.25

    def test_a_checkpoint_is_a_start_too(self, service: Service, client: OpenAI) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, adapter=UoraSpec(r=8).model_dump(mode="json"))
            name = add_adapter(session, service.tenant, job, step=5).id
        created = self.create(client, service, name)
        assert stored_job(service, created.id).warm_start == name

    def test_a_model_of_another_project_or_base_is_unknown(
        self, service: Service, client: OpenAI, lora: Adapter
    ) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, model="gone")
            orphan = add_adapter(session, service.tenant, job).id
        stranger = service.client(service.stranger)
        for asking, name in ((stranger, lora.id), (client, orphan), (client, "ft:tiny:acme::nothing")):
            with pytest.raises(openai.NotFoundError) as caught:
                self.create(asking, service, name)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


class TestPromote:
    """POST /v1/fine_tuning/jobs/{id}/checkpoints/{id}/promote"""

    @pytest.fixture
    def job_id(self, service: Service) -> str:
        """A job with a model and three checkpoints, the second of which is the best."""
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED)
            job.fine_tuned_model = add_adapter(session, service.tenant, job).id
            for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
                add_adapter(session, service.tenant, job, step=step, valid_loss=loss)
            return job.id

    def promote(self, service: Service, job_id: str, checkpoint: str) -> Any:
        return service.http().post(f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint}/promote")

    def adapters(self, service: Service, job_id: str) -> dict[int | None, Adapter]:
        with service.sessions() as session:
            found = session.query(Adapter).filter_by(job_id=job_id).all()
            for adapter in found:
                assert adapter.artifact
            return {adapter.checkpoint_step: adapter for adapter in found}

    def test_the_model_answers_as_the_checkpoint(self, service: Service, client: OpenAI, job_id: str) -> None:
        checkpoint = next(c for c in client.fine_tuning.jobs.checkpoints.list(job_id) if c.step_number == 1)
        for _ in range(2):
            answer = self.promote(service, job_id, checkpoint.id)
            assert (answer.status_code, answer.json()["id"]) == (200, checkpoint.id)
        adapters = self.adapters(service, job_id)
        final, source = adapters[None], adapters[1]
        assert (final.digest, final.artifact, final.manifest) == (source.digest, source.artifact, source.manifest)
        assert sorted(step for step in adapters if step is not None) == [1, 2, 3]
        assert messages(client, job_id) == [f"{final.id} answers as {source.id} from now on"]
        client.chat.completions.create(model=final.id, messages=[{"role": "user", "content": "hi"}])
        assert source.digest in str(service.engine.requests[-1])

    def test_the_best_has_the_lowest_validation_loss(self, service: Service, job_id: str) -> None:
        assert self.promote(service, job_id, "best").json()["step_number"] == 2
        adapters = self.adapters(service, job_id)
        assert adapters[None].digest == adapters[2].digest

    def test_what_cannot_be_promoted(self, service: Service, job_id: str) -> None:
        with service.sessions.begin() as session:
            unfinished = add_job(session, service.tenant, status=JobStatus.FAILED)
            add_adapter(session, service.tenant, unfinished, step=1, valid_loss=0.5)
            unmeasured = add_job(session, service.tenant, status=JobStatus.SUCCEEDED)
            unmeasured.fine_tuned_model = add_adapter(session, service.tenant, unmeasured).id
            add_adapter(session, service.tenant, unmeasured, step=1)
            ids = unfinished.id, unmeasured.id
        for other in ids:
            refused = self.promote(service, other, "best")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "checkpoint_not_promotable")
        foreign = self.promote(service, job_id, "ftckpt_of_another_job")
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "checkpoint_not_found")

    def test_a_deleted_model_stays_deleted(self, service: Service, client: OpenAI, job_id: str) -> None:
        checkpoint = next(iter(client.fine_tuning.jobs.checkpoints.list(job_id)))
        with service.sessions.begin() as session:
            session.query(Adapter).filter_by(job_id=job_id, checkpoint_step=None).delete()
        assert self.promote(service, job_id, checkpoint.id).status_code == 400


class TestResultFile:
    """What a job writes is listed and read as any file, and written by jobs alone."""

    def test_it_is_read_by_the_jobs_id_of_it(self, service: Service, client: OpenAI) -> None:
        content = b"step,train_loss\n1,0.5\n"
        with service.sessions.begin() as session:
            file = add_file(session, service.tenant, purpose="fine-tune-results", bytes=len(content))
            job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, result_files=[file.id])
            service.settings.storage_dir.joinpath(file.id).write_bytes(content)
        shown = client.fine_tuning.jobs.retrieve(job.id)
        assert [client.files.content(file_id).content for file_id in shown.result_files] == [content]
        assert [found.id for found in client.files.list(purpose="fine-tune-results")] == [file.id]
        assert list(client.files.list(purpose="fine-tune")) == []

    def test_a_client_cannot_upload_one(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(file=b"x", purpose="fine-tune-results")  # type: ignore[arg-type]
        assert caught.value.param == "purpose"
