"""Fine-tuning jobs through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from api.database import now
from api.jobs.models import ENDED, Job, JobStatus
from api.jobs.repository import add_event
from api.queue import TaskName
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service
from uora.spec import HyperparameterRequest, UoraSpec, parse_adapter, resolve

AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


@pytest.fixture
def file_id(service: Service) -> str:
    """A training file."""
    with service.sessions.begin() as session:
        return add_file(session, service.tenant).id


def stored_job(service: Service, job_id: str) -> Job:
    """The row."""
    with service.sessions() as session:
        return session.query(Job).filter_by(id=job_id).one()


class TestCreate:
    """POST /v1/fine_tuning/jobs"""

    def test_defaults(self, service: Service, client: OpenAI, file_id: str) -> None:
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
        assert job.id.startswith("ftjob-")
        assert job.object == "fine_tuning.job"
        assert job.status == "validating_files"
        assert job.organization_id == service.tenant.project_id
        assert job.model == "tiny"
        assert 0 <= job.seed < 2**31
        assert job.hyperparameters.to_dict() == AUTO
        assert job.method
        assert job.method.to_dict() == {
            "type": "supervised",
            "supervised": {"hyperparameters": AUTO},
        }
        assert job.result_files == []
        for empty in ("finished_at", "fine_tuned_model", "trained_tokens", "error", "metadata", "integrations"):
            assert getattr(job, empty) is None
        assert job.progress is None  # type: ignore[attr-defined]
        assert job.adapter == {**UoraSpec().model_dump(mode="json"), "learning_rate": None}  # type: ignore[attr-defined]
        assert service.queue.messages == [(TaskName.VALIDATE, job.id)]
        assert client.fine_tuning.jobs.retrieve(job.id) == job
        assert [event.message for event in client.fine_tuning.jobs.list_events(job.id)] == [
            f"Created fine-tuning job: {job.id}"
        ]

    def test_everything_that_can_be_said(self, service: Service, client: OpenAI, file_id: str) -> None:
        with service.sessions.begin() as session:
            validation_id = add_file(session, service.tenant).id
        job = client.fine_tuning.jobs.create(
            model="org/slashed",
            training_file=file_id,
            validation_file=validation_id,
            suffix="my-model.v2",
            seed=0,
            metadata={"team": "red", "empty": ""},
            integrations=[],
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.5}},
            },
            extra_body={
                "peft": {
                    "method": "uora",
                    "r": 16,
                    "targets": "q_proj, v_proj",
                    "alpha": 0.25,
                    "tau": 1e-4,
                    "count_k": 2,
                    "d_initial": 0.2,
                    "dropout": 0.1,
                    "frame_seed": 7,
                    "learning_rate": 0.01,
                }
            },
        )
        assert (job.seed, job.metadata, job.validation_file) == (0, {"team": "red", "empty": ""}, validation_id)
        row = stored_job(service, job.id)
        assert row.suffix == "my-model.v2"
        assert row.learning_rate == 0.01
        assert parse_adapter(row.adapter) == UoraSpec(
            r=16,
            targets=("q_proj", "v_proj"),
            alpha=0.25,
            tau=1e-4,
            count_k=2,
            d_initial=0.2,
            dropout=0.1,
            frame_seed=7,
        )
        assert HyperparameterRequest.model_validate(row.hyperparameters) == HyperparameterRequest(
            n_epochs=3, batch_size=4, learning_rate_multiplier=0.5
        )

    @pytest.mark.parametrize(
        ("sent", "kept"),
        [("q,v", "q,v"), ("all-linear", "all-linear"), (["k_proj"], ("k_proj",)), ("a, b", ("a", "b"))],
    )
    def test_targets(self, service: Service, client: OpenAI, file_id: str, sent: Any, kept: Any) -> None:
        peft = {"peft": {"targets": sent}}
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=peft)
        assert parse_adapter(stored_job(service, job.id).adapter).targets == kept

    def test_the_deprecated_place_of_hyperparameters(self, client: OpenAI, file_id: str) -> None:
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=file_id, hyperparameters={"n_epochs": 2, "batch_size": "auto"}
        )
        assert job.hyperparameters.n_epochs == 2
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(
                model="tiny",
                training_file=file_id,
                hyperparameters={"n_epochs": 2},
                method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            )
        assert caught.value.param == "hyperparameters"

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"model": 5}, "model"),
            ({"model": None}, "model"),
            ({"training_file": ""}, "training_file"),
            ({"suffix": ""}, "suffix"),
            ({"suffix": "x" * 65}, "suffix"),
            ({"suffix": "a:b"}, "suffix"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**31}, "seed"),
            ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
            ({"metadata": {"k": "v" * 513}}, "metadata.k"),
            ({"metadata": {"k": 5}}, "metadata.k"),
            ({"trainingfile": "x"}, "trainingfile"),
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
            ({"method": {"type": "dpo"}}, "method.type"),
            ({"method": {"type": "reinforcement"}}, "method.type"),
            ({"method": {"type": "distillation"}}, "method.type"),
            ({"method": {}}, "method.type"),
            ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
            ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
            ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
            ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
            ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
            (
                {
                    "method": {
                        "type": "supervised",
                        "supervised": {"hyperparameters": {"learning_rate_multiplier": 0}},
                    }
                },
                "method.supervised.hyperparameters.learning_rate_multiplier",
            ),
            (
                {"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}}},
                "method.supervised.hyperparameters.epochs",
            ),
            ({"peft": {"rank": 8}}, "peft.rank"),
            ({"peft": {"r": 0}}, "peft.r"),
            ({"peft": {"method": "dora"}}, "peft.method"),
            ({"peft": {"method": "lora", "r": 8, "tau": 1e-4}}, "peft.tau"),
            ({"peft": {"tau_quantile": 0.1}}, "peft"),
            ({"peft": {"targets": ""}}, "peft.targets"),
            ({"peft": {"targets": [1]}}, "peft.targets[0]"),
            ({"peft": {"alpha": 1.5}}, "peft.alpha"),
            ({"peft": {"tau": -1}}, "peft.tau"),
            ({"peft": {"count_k": 0}}, "peft.count_k"),
            ({"peft": {"dropout": 1}}, "peft.dropout"),
            ({"peft": {"frame_seed": -1}}, "peft.frame_seed"),
            ({"peft": {"learning_rate": 0}}, "peft.learning_rate"),
            ({"peft": "uora"}, "peft"),
        ],
        ids=str,
    )
    def test_a_value_that_cannot_be_used_is_named(
        self, service: Service, file_id: str, change: dict[str, Any], param: str
    ) -> None:
        body = {"model": "tiny", "training_file": file_id, **change}
        answer = service.http().post("/v1/fine_tuning/jobs", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert param in error["message"] or error["code"] == "unsupported_parameter"
        assert service.queue.messages == []

    def test_an_unknown_model_is_not_replaced(self, service: Service, client: OpenAI, file_id: str) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.fine_tuning.jobs.create(model="gpt-4o", training_file=file_id)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert "tiny" in caught.value.message

    def test_files_must_be_there_and_usable(self, service: Service, client: OpenAI, file_id: str) -> None:
        with service.sessions.begin() as session:
            foreign = add_file(session, service.stranger).id
            wrong = add_file(session, service.tenant, purpose="evals").id
            empty = add_file(session, service.tenant, bytes=0).id
        for param in ("training_file", "validation_file"):
            for other, status, code in (
                (foreign, 404, "file_not_found"),
                ("file-none", 404, "file_not_found"),
                (wrong, 400, "invalid_file_purpose"),
                (empty, 400, "empty_file"),
            ):
                body: dict[str, Any] = {"model": "tiny", "training_file": file_id, param: other}
                with pytest.raises(openai.APIStatusError) as caught:
                    client.fine_tuning.jobs.create(**body)
                found = (caught.value.status_code, caught.value.code, caught.value.param)
                assert found == (status, code, param)
        assert list(client.fine_tuning.jobs.list()) == []


class TestRead:
    """Lists, one job, its events and checkpoints."""

    def test_a_finished_job_tells_what_was_run(self, service: Service, client: OpenAI) -> None:
        spec = resolve(HyperparameterRequest(), adapter=UoraSpec(r=8), learning_rate=None, seed=1, n_examples=100)
        with service.sessions.begin() as session:
            job = add_job(
                session,
                service.tenant,
                status=JobStatus.SUCCEEDED,
                training_spec=spec.model_dump(mode="json"),
                finished_at=now(),
                estimated_finish=now(),
                trained_tokens=1234,
                fine_tuned_model="ft:tiny:acme-corp::abcdefgh",
                progress={"step": 5, "total_steps": 5},
            )
        shown = client.fine_tuning.jobs.retrieve(job.id)
        assert shown.status == "succeeded"
        assert shown.hyperparameters.to_dict() == spec.hyperparameters.model_dump()
        assert shown.method
        assert shown.method.supervised
        assert shown.method.supervised.hyperparameters
        assert shown.method.supervised.hyperparameters.n_epochs == spec.hyperparameters.n_epochs
        assert shown.adapter["learning_rate"] == spec.learning_rate  # type: ignore[attr-defined]
        assert shown.progress == {"percent": 100.0, "step": 5, "total_steps": 5}  # type: ignore[attr-defined]
        assert shown.trained_tokens == 1234
        assert shown.finished_at
        assert abs(shown.finished_at - now().timestamp()) < 60

    def test_a_failed_job_tells_why(self, service: Service, client: OpenAI) -> None:
        error = {"code": "invalid_training_file", "message": "Line 3: not JSON", "param": "training_file"}
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.FAILED, error=error)
        shown = client.fine_tuning.jobs.retrieve(job.id)
        assert shown.error
        assert shown.error.to_dict() == error

    def test_metadata_filters(self, service: Service, client: OpenAI) -> None:
        odd = "a\"b.$[0]'%"
        with service.sessions.begin() as session:
            plain = add_job(session, service.tenant).id
            red = add_job(session, service.tenant, labels={"team": "red", "stage": "1"}).id
            red_two = add_job(session, service.tenant, labels={"team": "red", "stage": "2"}).id
            strange = add_job(session, service.tenant, labels={odd: odd, "none": ""}).id
            add_job(session, service.stranger, labels={"team": "red"})

        def found(**query: Any) -> list[str]:
            return [job.id for job in client.fine_tuning.jobs.list(**query)]

        assert found() == [strange, red_two, red, plain]
        assert found(metadata={"team": "red"}) == [red_two, red]
        assert found(metadata={"team": "red", "stage": "1"}) == [red]
        assert found(metadata={"team": "blue"}) == []
        assert found(metadata={odd: odd}) == [strange]
        assert found(metadata={"none": ""}) == [strange]
        assert found(extra_query={"metadata": "null"}) == [plain]
        with pytest.raises(openai.BadRequestError) as caught:
            found(extra_query={"metadata": "red"})
        assert caught.value.param == "metadata"

    def test_events_and_checkpoints_come_newest_first(self, service: Service, client: OpenAI) -> None:
        with service.sessions.begin() as session:
            job, other = add_job(session, service.tenant), add_job(session, service.tenant)
            for step in range(3):
                add_event(session, job.id, message=f"Step {step}", type="metrics", data={"step": step, "loss": 0.5})
                add_adapter(session, service.tenant, job, step=step)
            add_event(session, other.id, message="of another job")
        jobs = client.fine_tuning.jobs
        events = list(jobs.list_events(job.id, limit=2))
        assert [event.data["step"] for event in events] == [2, 1, 0]  # type: ignore[index]
        assert {(event.type, event.level, event.object) for event in events} == {
            ("metrics", "info", "fine_tuning.job.event")
        }
        checkpoints = list(jobs.checkpoints.list(job.id, limit=2))
        assert [checkpoint.step_number for checkpoint in checkpoints] == [2, 1, 0]
        assert checkpoints[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-2")
        assert checkpoints[0].fine_tuning_job_id == job.id
        assert checkpoints[0].metrics.train_loss == 0.5

    def test_a_cursor_of_another_list_is_refused(self, service: Service, client: OpenAI) -> None:
        with service.sessions.begin() as session:
            job, other = add_job(session, service.tenant), add_job(session, service.tenant)
            event = add_event(session, other.id, message="of another job")
            foreign = add_job(session, service.stranger)
        for call in (
            lambda: client.fine_tuning.jobs.list_events(job.id, after=event.id),
            lambda: client.fine_tuning.jobs.list(after=foreign.id),
            lambda: client.fine_tuning.jobs.list(limit=0),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                call()
            assert caught.value.param in ("after", "limit")


class TestCancel:
    """POST /v1/fine_tuning/jobs/{id}/cancel"""

    @pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, JobStatus.QUEUED])
    def test_a_waiting_job_ends_at_once(self, service: Service, client: OpenAI, status: JobStatus) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=status)
        cancelled = client.fine_tuning.jobs.cancel(job.id)
        assert cancelled.status == "cancelled"
        assert cancelled.finished_at is not None
        assert [event.message for event in client.fine_tuning.jobs.list_events(job.id)] == ["Cancelled"]

    def test_a_running_job_is_asked_to_stop_once(self, service: Service, client: OpenAI) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.RUNNING)
        for _ in range(2):
            assert client.fine_tuning.jobs.cancel(job.id).status == "running"
        assert stored_job(service, job.id).cancel_requested
        assert len(list(client.fine_tuning.jobs.list_events(job.id))) == 1

    @pytest.mark.parametrize("status", sorted(ENDED))
    def test_an_ended_job_stays_as_it_is(self, service: Service, status: JobStatus) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=status)
        with pytest.raises(openai.BadRequestError) as caught:
            service.client(max_retries=2).fine_tuning.jobs.cancel(job.id)
        assert caught.value.code == "job_not_cancellable"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert stored_job(service, job.id).status == status
