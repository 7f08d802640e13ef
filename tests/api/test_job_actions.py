"""Deleting, retrying, cloning, comparing jobs, and trials of a request."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import openai
import pytest
from openai import OpenAI

from api.database import now
from api.files.models import File
from api.jobs.models import ENDED, Checkpoint, Job, JobEvent, JobStatus, TrainingState
from api.jobs.repository import add_event
from api.jobs.requests import merge_patch, request_of
from api.jobs.schemas import JobCreate
from api.models.models import Adapter
from api.queue import TaskName
from tests.api.rows import add_adapter, add_file, add_job, add_state
from tests.api.support import Service
from uora.spec import UoraSpec

JOBS = "/v1/fine_tuning/jobs"
RETRIED = (JobStatus.FAILED, JobStatus.CANCELLED)


@pytest.fixture
def file_id(service: Service) -> str:
    """A training file."""
    with service.sessions.begin() as session:
        return add_file(session, service.tenant).id


def make_job(service: Service, status: JobStatus, **values: Any) -> str:
    """A job with a model, two checkpoints, an event and a state."""
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=status, **values)
        add_event(session, job.id, message="something happened")
        job.fine_tuned_model = add_adapter(session, service.tenant, job).id
        for step in (5, 10):
            add_adapter(session, service.tenant, job, step=step, valid_loss=1 / step)
        add_state(session, job)
        return job.id


def error(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found | {"status": answer.status_code}


class TestDelete:
    """DELETE /v1/fine_tuning/jobs/{job_id}"""

    @pytest.mark.parametrize("models", [False, True])
    @pytest.mark.parametrize("status", sorted(ENDED))
    def test_what_goes_and_what_stays(self, service: Service, status: JobStatus, models: bool) -> None:
        job_id = make_job(service, status)
        name = service.client().fine_tuning.jobs.retrieve(job_id).fine_tuned_model
        assert name
        answer = service.http().delete(f"{JOBS}/{job_id}", params={"models": models})
        assert answer.json() == {"id": job_id, "object": "fine_tuning.job", "deleted": True}
        assert service.http().get(f"{JOBS}/{job_id}").status_code == 404
        assert service.http().delete(f"{JOBS}/{job_id}").status_code == 404
        with service.sessions() as session:
            for rows in (JobEvent, Checkpoint, TrainingState):
                assert session.query(rows).filter_by(job_id=job_id).count() == 0
            left = session.query(Adapter.id, Adapter.job_id).filter(Adapter.id.startswith(name)).all()
        assert [tuple(row) for row in left] == ([] if models else [(name, None)])
        if not models:
            assert service.client().models.retrieve(name).id == name
            assert service.client().models.delete(name).deleted

    @pytest.mark.parametrize("status", sorted(set(JobStatus) - ENDED))
    def test_an_unfinished_job_stays(self, service: Service, status: JobStatus) -> None:
        job_id = make_job(service, status)
        refusal = error(service.http().delete(f"{JOBS}/{job_id}"))
        assert (refusal["status"], refusal["code"]) == (400, "job_not_deletable")
        assert status in refusal["message"]
        assert service.http().get(f"{JOBS}/{job_id}").status_code == 200

    def test_other_jobs_are_left_alone(self, service: Service) -> None:
        gone, other = make_job(service, JobStatus.SUCCEEDED), make_job(service, JobStatus.SUCCEEDED)
        assert service.http().delete(f"{JOBS}/{gone}?models=true").status_code == 200
        client = service.client()
        assert len(list(client.fine_tuning.jobs.list_events(other))) == 1
        assert len(list(client.fine_tuning.jobs.checkpoints.list(other))) == 2
        assert [job.id for job in client.fine_tuning.jobs.list()] == [other]


def full_body(service: Service, file_id: str) -> dict[str, Any]:
    """A request with a value of its own everywhere."""
    with service.sessions.begin() as session:
        validation_id = add_file(session, service.tenant).id
    return {
        "model": "tiny",
        "training_file": file_id,
        "validation_file": validation_id,
        "suffix": "mine",
        "seed": 7,
        "metadata": {"team": "red"},
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.5},
            },
        },
        "peft": {"method": "uora", "r": 16, "targets": ["q_proj"], "tau": 1e-4, "learning_rate": 0.01},
        "training": {"max_length": 128, "early_stopping_patience": 2},
        "task": "chat",
    }


#: What a job made of another one's request has of its own.
OWN = ("id", "created_at", "origin_job", "status", "error", "finished_at")


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name not in OWN}


class TestRetry:
    """POST /v1/fine_tuning/jobs/{job_id}/retry"""

    @pytest.mark.parametrize("status", RETRIED)
    def test_a_new_job_of_the_same_request(self, service: Service, file_id: str, status: JobStatus) -> None:
        http = service.http()
        first = http.post(JOBS, json=full_body(service, file_id)).json()
        with service.sessions.begin() as session:
            job = session.query(Job).filter_by(id=first["id"]).one()
            job.status, job.finished_at, job.error = status, now(), {"code": "internal_error", "message": "x"}
        service.queue.reset()
        again = http.post(f"{JOBS}/{first['id']}/retry").json()
        assert settings_of(again) == settings_of(first)
        assert (again["status"], again["origin_job"], again["error"]) == ("validating_files", first["id"], None)
        assert again["id"] != first["id"]
        assert service.queue.messages == [(TaskName.VALIDATE, again["id"])]
        assert http.get(f"{JOBS}/{first['id']}").json()["status"] == status  # as its watchers were told

    @pytest.mark.parametrize("status", sorted(set(JobStatus) - set(RETRIED)))
    def test_others_are_refused(self, service: Service, file_id: str, status: JobStatus) -> None:
        job_id = make_job(service, status, training_file=file_id)
        refusal = error(service.http().post(f"{JOBS}/{job_id}/retry"))
        assert (refusal["status"], refusal["code"]) == (400, "job_not_retryable")

    def test_what_was_deleted_since_is_missed(self, service: Service) -> None:
        job_id = make_job(service, JobStatus.FAILED, training_file="file-gone", adapter=UoraSpec().model_dump())
        refusal = error(service.http().post(f"{JOBS}/{job_id}/retry"))
        assert (refusal["status"], refusal["code"], refusal["param"]) == (404, "file_not_found", "training_file")


class TestClone:
    """POST /v1/fine_tuning/jobs/{job_id}/clone"""

    def test_a_request_says_all_that_a_body_can(self, service: Service, file_id: str) -> None:
        """Whoever adds a parameter must add it to ``request_of`` too."""
        job_id = service.http().post(JOBS, json=full_body(service, file_id)).json()["id"]
        with service.sessions() as session:
            request = request_of(session.query(Job).filter_by(id=job_id).one())
        deprecated = {"hyperparameters"}
        assert set(request) == set(JobCreate.model_fields) - deprecated

    def test_changes_are_merged(self, service: Service, file_id: str) -> None:
        http = service.http()
        first = http.post(JOBS, json=full_body(service, file_id)).json()
        hyperparameters = {"n_epochs": 5, "learning_rate_multiplier": None}
        changes = {
            "method": {"supervised": {"hyperparameters": hyperparameters}},
            "peft": {"r": 32},
            "metadata": {"team": None, "try": "2"},
            "suffix": None,
            "seed": 8,
        }
        made = http.post(f"{JOBS}/{first['id']}/clone", json=changes).json()
        expected = {"n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": "auto"}
        assert made["hyperparameters"] == expected
        assert made["adapter"] == {**first["adapter"], "r": 32}
        assert (made["metadata"], made["seed"], made["origin_job"]) == ({"try": "2"}, 8, first["id"])
        changed = {"hyperparameters", "method", "adapter", "metadata", "seed"}
        for name, value in settings_of(first).items():
            assert (made[name] == value) == (name not in changed), name
        copy = http.post(f"{JOBS}/{first['id']}/clone").json()
        assert settings_of(copy) == settings_of(first)

    def test_another_method_starts_from_its_own_defaults(self, service: Service, file_id: str) -> None:
        http = service.http()
        first = http.post(JOBS, json=full_body(service, file_id)).json()
        made = http.post(f"{JOBS}/{first['id']}/clone", json={"peft": {"method": "lora", "r": 4}})
        assert made.status_code == 200, made.text
        assert (made.json()["adapter"]["method"], made.json()["adapter"]["r"]) == ("lora", 4)
        assert made.json()["adapter"]["learning_rate"] is None

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"peft": {"rank": 8}}, "peft.rank"),
            ({"seed": -1}, "seed"),
            ({"model": None}, "model"),
            ({"training_file": "file-unknown"}, "training_file"),
            ({"validation_file": None}, "validation_file"),  # early stopping needs it
            ({"method": {"supervised": {"hyperparameters": {"n_epochs": 0}}}}, None),
        ],
    )
    def test_the_result_is_checked_as_a_new_job(
        self, service: Service, file_id: str, changes: dict[str, Any], param: str | None
    ) -> None:
        http = service.http()
        first = http.post(JOBS, json=full_body(service, file_id)).json()
        refusal = error(http.post(f"{JOBS}/{first['id']}/clone", json=changes))
        assert refusal["status"] in (400, 404)
        assert refusal["param"] == (param or "method.supervised.hyperparameters.n_epochs")
        assert len(http.get(JOBS).json()["data"]) == 1

    def test_of_a_fine_tuned_model(self, service: Service, file_id: str) -> None:
        """The adapter is that model's, so that naming all of it contradicts nothing."""
        with service.sessions.begin() as session:
            source = add_job(session, service.tenant, adapter=UoraSpec(r=8).model_dump(mode="json"))
            name = add_adapter(session, service.tenant, source).id
        http = service.http()
        first = http.post(JOBS, json={"model": name, "training_file": file_id, "peft": {"dropout": 0.1}}).json()
        made = http.post(f"{JOBS}/{first['id']}/clone", json={"seed": 1}).json()
        assert (made["model"], made["adapter"]) == (name, first["adapter"])

    @pytest.mark.parametrize(
        ("target", "patch", "result"),
        [  # of RFC 7396, appendix A
            ({"a": "b"}, {"a": "c"}, {"a": "c"}),
            ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
            ({"a": "b"}, {"a": None}, {}),
            ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
            ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
            ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
            ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
            ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
            (["a", "b"], ["c", "d"], ["c", "d"]),
            ({"a": "b"}, ["c"], ["c"]),
            ({"a": "foo"}, None, None),
            ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
            ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
            ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ],
    )
    def test_merge_patch(self, target: Any, patch: Any, result: Any) -> None:
        assert merge_patch(target, patch) == result


class TestCompare:
    """GET /v1/fine_tuning/jobs/compare"""

    def test_side_by_side(self, service: Service) -> None:
        started = now() - timedelta(minutes=5)
        same = {"training_file": "file-x", "adapter": UoraSpec(r=8).model_dump(mode="json"), "labels": {"n": "1"}}
        wide = {**same, "adapter": UoraSpec(r=16).model_dump(mode="json"), "labels": {"n": "2"}}
        times = {"started_at": started, "finished_at": started + timedelta(seconds=90)}
        first = make_job(service, JobStatus.SUCCEEDED, best_step=10, trained_tokens=5, **same, **times)
        with service.sessions.begin() as session:
            second = add_job(
                session, service.tenant, status=JobStatus.RUNNING, progress={"step": 2, "total_steps": 9}, **wide
            ).id
        found = service.http().get(f"{JOBS}/compare", params={"ids": f"{second},{first}"}).json()
        assert found["differences"] == {"peft.r": {second: 16, first: 8}}
        running, ended = found["jobs"]
        assert running == {
            "id": second,
            "status": "running",
            "fine_tuned_model": None,
            "metrics": {"step": 2, "total_steps": 9},
            "best_step": None,
            "trained_tokens": None,
            "adapter_bytes": None,
            "seconds": None,
        }
        assert ended["metrics"] == {"step": 10, "train_loss": 0.5, "valid_loss": 0.1}
        assert (ended["best_step"], ended["trained_tokens"], ended["seconds"]) == (10, 5, 90.0)
        assert ended["adapter_bytes"] == len(b"vectors of None")

    def test_settled_values_are_compared(self, service: Service) -> None:
        with service.sessions.begin() as session:
            specs = [{"hyperparameters": {"n_epochs": n}, "learning_rate": 0.01} for n in (3, 4)]
            ids = [add_job(session, service.tenant, training_spec=spec).id for spec in specs]
        found = service.http().get(f"{JOBS}/compare", params={"ids": ",".join(ids)}).json()
        assert found["differences"] == {"hyperparameters.n_epochs": dict(zip(ids, (3, 4), strict=True))}

    def test_foreign_and_unknown_jobs(self, service: Service) -> None:
        with service.sessions.begin() as session:
            mine, foreign = add_job(session, service.tenant).id, add_job(session, service.stranger).id
        for other in (foreign, "ftjob-unknown"):
            refusal = error(service.http().get(f"{JOBS}/compare", params={"ids": f"{mine},{other}"}))
            assert (refusal["status"], refusal["code"], refusal["param"]) == (404, "job_not_found", "ids")
        refusal = error(service.http().get(f"{JOBS}/compare", params={"ids": ",".join("abc" * 20)}))
        assert refusal["status"] in (400, 404)


class TestDryRun:
    """POST /v1/fine_tuning/jobs?dry_run=true"""

    def test_what_would_be_made(self, service: Service, file_id: str) -> None:
        http = service.http()
        body = full_body(service, file_id)
        plan = http.post(f"{JOBS}?dry_run=true", json=body).json()
        assert service.queue.messages == []
        assert http.get(JOBS).json()["data"] == []
        job = http.post(JOBS, json=body).json()
        assert plan.pop("object") == "fine_tuning.job.plan"
        assert plan.pop("base_model") == "tiny"
        assert plan.pop("fine_tuned_model") == f"ft:tiny:{service.tenant.slug}:mine:<job>"
        assert plan == {name: job[name] for name in plan}
        assert plan.keys() >= {"model", "training_file", "hyperparameters", "adapter", "options", "seed"}
        assert http.post(f"{JOBS}?dry_run=true", json={**body, "seed": None}).json()["seed"] is None

    def test_all_that_a_job_is_refused_for(self, service: Service, client: OpenAI, file_id: str) -> None:
        with service.sessions.begin() as session:
            empty = add_file(session, service.tenant, bytes=0).id
            session.query(File).filter_by(id=file_id).one()
        good = {"model": "tiny", "training_file": file_id}
        bad: list[dict[str, Any]] = [
            {"model": "unknown"},
            {"training_file": "file-unknown"},
            {"training_file": empty},
            {"integrations": [{"type": "wandb"}]},
            {"extra_body": {"training": {"early_stopping_patience": 1}}},
            {"extra_body": {"peft": {"rank": 1}}},
        ]
        for values in bad:
            refusals = []
            for query in ({}, {"dry_run": True}):
                with pytest.raises(openai.APIStatusError) as caught:
                    client.fine_tuning.jobs.create(**{**good, **values}, extra_query=query)  # type: ignore[arg-type]
                refusals.append((caught.value.status_code, caught.value.body))
            assert refusals[0] == refusals[1]
