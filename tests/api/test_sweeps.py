"""Sweeps over plain HTTP: the jobs that are made, what is refused, and which job is the best."""

from __future__ import annotations

from typing import Any

import pytest

from api.jobs.models import Job, JobStatus
from api.queue import TaskName
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service, Tenant

SWEEPS = "/v1/fine_tuning/sweeps"


@pytest.fixture
def body(service: Service) -> dict[str, Any]:
    """Two seeds with two learning rates."""
    with service.sessions.begin() as session:
        files = [add_file(session, service.tenant).id for _ in range(2)]
    return {
        "model": "tiny",
        "training_file": files[0],
        "validation_file": files[1],
        "sweep": {"seeds": [0, 7], "learning_rates": [0.01, 1e-05]},
    }


def post(service: Service, body: dict[str, Any]) -> Any:
    return service.http().post(SWEEPS, json=body)


def get(service: Service, sweep_id: str) -> Any:
    return service.http().get(f"{SWEEPS}/{sweep_id}").json()


def jobs_of(service: Service, tenant: Tenant) -> list[Job]:
    with service.sessions() as session:
        return session.query(Job).filter_by(project_id=tenant.project_id).order_by(Job.seq).all()


def test_a_job_for_each_combination(service: Service, body: dict[str, Any]) -> None:
    body |= {"suffix": "try", "metadata": {"team": "red"}, "peft": {"r": 16}}
    made = post(service, body).json()
    jobs = jobs_of(service, service.tenant)
    assert made["id"].startswith("ftsweep-")
    assert (made["object"], made["status"], made["best_job"]) == ("fine_tuning.sweep", "validating_files", None)
    assert made["jobs"] == [job.id for job in jobs] == [result["job"] for result in made["results"]]
    pairs = [(0, 0.01), (0, 1e-05), (7, 0.01), (7, 1e-05)]
    assert [(job.seed, job.learning_rate) for job in jobs] == pairs
    assert [(result["seed"], result["learning_rate"]) for result in made["results"]] == pairs
    assert [job.suffix for job in jobs] == ["try-s0-lr0.01", "try-s0-lr1e-05", "try-s7-lr0.01", "try-s7-lr1e-05"]
    assert {(job.sweep_id, job.adapter["r"], job.training_file) for job in jobs} == {
        (made["id"], 16, body["training_file"])
    }
    assert all(job.labels == {"team": "red"} for job in jobs)
    assert service.queue.messages == [(TaskName.VALIDATE, job.id) for job in jobs]
    assert service.client().fine_tuning.jobs.retrieve(jobs[0].id).sweep == made["id"]  # type: ignore[attr-defined]
    assert get(service, made["id"]) == made


@pytest.mark.parametrize(
    ("sweep", "count", "suffix"),
    [({"seeds": [3]}, 1, "s3"), ({"learning_rates": [0.5, 0.25]}, 2, "lr0.5"), ({"seeds": [*range(64)]}, 64, "s0")],
)
def test_one_of_the_two_is_enough(
    service: Service, body: dict[str, Any], sweep: dict[str, Any], count: int, suffix: str
) -> None:
    made = post(service, body | {"sweep": sweep}).json()
    jobs = jobs_of(service, service.tenant)
    assert (len(made["jobs"]), jobs[0].suffix) == (count, suffix)
    assert len({job.suffix for job in jobs}) == count


@pytest.mark.parametrize("given", [{}, {"seed": 5}])
def test_learning_rates_are_compared_on_one_seed(service: Service, body: dict[str, Any], given: dict[str, int]) -> None:
    post(service, body | given | {"sweep": {"learning_rates": [0.1, 0.2, 0.3]}}).raise_for_status()
    seeds = {job.seed for job in jobs_of(service, service.tenant)}
    assert len(seeds) == 1
    assert seeds >= set(given.values())


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"sweep": {}}, "sweep", "invalid_value"),
        ({"sweep": {"seeds": [*range(65)]}}, "sweep", "invalid_value"),
        ({"sweep": {"seeds": [*range(13)], "learning_rates": [1, 2, 3, 4, 5]}}, "sweep", "invalid_value"),
        ({"sweep": {"seeds": [1, 1]}}, "sweep", "invalid_value"),
        ({"sweep": {"seeds": [1], "ranks": [8]}}, "sweep.ranks", "unknown_parameter"),
        ({"sweep": {"learning_rates": [0]}}, "sweep.learning_rates[0]", "invalid_value"),
        ({"sweep": None}, "sweep", "invalid_value"),
        ({"validation_file": None}, "validation_file", "missing_required_parameter"),
        ({"validation_file": "file-none"}, "validation_file", "file_not_found"),
        ({"seed": 0}, "seed", "invalid_value"),
        ({"peft": {"learning_rate": 0.1}}, "peft.learning_rate", "invalid_value"),
        ({"suffix": "x" * 60}, "suffix", "invalid_value"),
        ({"model": "none"}, "model", "model_not_found"),
    ],
)
def test_what_is_refused_makes_no_job(
    service: Service, body: dict[str, Any], change: dict[str, Any], param: str, code: str
) -> None:
    answer = post(service, body | change)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert answer.status_code == (404 if code.endswith("not_found") else 400)
    assert jobs_of(service, service.tenant) == []
    assert service.queue.messages == []


def test_a_refusal_of_a_later_job_takes_the_earlier_back(service: Service, body: dict[str, Any]) -> None:
    """The second suffix is the one that is too long."""
    answer = post(service, body | {"suffix": "x" * 54, "sweep": {"seeds": [1, 2**31 - 1]}})
    assert answer.json()["error"]["param"] == "suffix"
    assert jobs_of(service, service.tenant) == []


class TestResults:
    """GET /v1/fine_tuning/sweeps/{id}"""

    def test_the_best_is_the_lowest_of_the_succeeded(self, service: Service) -> None:
        losses = [(JobStatus.SUCCEEDED, 0.5), (JobStatus.SUCCEEDED, 0.25), (JobStatus.CANCELLED, 0.1)]
        ids = [self._ended(service, status, {5: loss}) for status, loss in [*losses, (JobStatus.FAILED, None)]]
        shown = get(service, "ftsweep-a")
        assert [result["valid_loss"] for result in shown["results"]] == [0.5, 0.25, 0.1, None]
        assert (shown["best_job"], shown["status"]) == (ids[1], "succeeded")

    def test_the_loss_is_that_of_the_model_that_answers(self, service: Service) -> None:
        """The last one, and after a promotion the promoted one."""
        job_id = self._ended(service, JobStatus.SUCCEEDED, {4: 0.2, 5: 0.4})
        other = self._ended(service, JobStatus.SUCCEEDED, {5: 0.3})
        assert get(service, "ftsweep-a")["best_job"] == other
        service.http().post(f"/v1/fine_tuning/jobs/{job_id}/checkpoints/best/promote").raise_for_status()
        shown = get(service, "ftsweep-a")
        assert shown["results"][0]["valid_loss"] == 0.2
        assert shown["best_job"] == job_id

    def test_the_latest_loss_of_a_job_that_goes_on(self, service: Service) -> None:
        self._ended(service, JobStatus.RUNNING, {4: 0.2, 5: 0.4})
        shown = get(service, "ftsweep-a")
        assert [result["valid_loss"] for result in shown["results"]] == [0.4]
        assert (shown["best_job"], shown["status"]) == (None, "running")

    @pytest.mark.parametrize(
        ("statuses", "expected"),
        [
            (["queued", "running", "failed"], "running"),
            (["succeeded", "paused"], "paused"),
            (["failed", "succeeded", "cancelled"], "succeeded"),
            (["cancelled", "failed"], "failed"),
            (["cancelled"], "cancelled"),
        ],
    )
    def test_status(self, service: Service, statuses: list[str], expected: str) -> None:
        for status in statuses:
            self._ended(service, JobStatus(status), {})
        assert get(service, "ftsweep-a")["status"] == expected

    def _ended(self, service: Service, status: JobStatus, losses: dict[int, float | None]) -> str:
        """A job of the sweep with checkpoints; a model that answers as the last one if it succeeded."""
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=status, sweep_id="ftsweep-a")
            for step, loss in losses.items():
                last = add_adapter(session, service.tenant, job, step=step, valid_loss=loss)
            if status == JobStatus.SUCCEEDED and losses:
                final = add_adapter(session, service.tenant, job)
                final.digest, job.fine_tuned_model = last.digest, final.id
            return job.id


def test_another_projects_sweep_is_not_there(service: Service, body: dict[str, Any]) -> None:
    sweep_id = post(service, body).json()["id"]
    foreign = service.http(service.stranger).get(f"{SWEEPS}/{sweep_id}")
    unknown = service.http(service.stranger).get(f"{SWEEPS}/ftsweep-none")
    assert [answer.json()["error"]["code"] for answer in (foreign, unknown)] == ["sweep_not_found"] * 2
    assert (foreign.status_code, unknown.status_code) == (404, 404)
