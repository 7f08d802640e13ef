"""Watching and moving jobs with the official client, as far as it goes, and with what it lets through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from api.jobs.models import Job, JobStatus
from api.jobs.repository import add_event
from tests.api.rows import add_file, add_job
from tests.api.support import Service
from uora.spec import UoraSpec

JOBS = "/fine_tuning/jobs"


@pytest.fixture
def job_id(service: Service) -> str:
    """A running job."""
    with service.sessions.begin() as session:
        file_id = add_file(session, service.tenant).id
        adapter = UoraSpec(r=8).model_dump(mode="json")
        return add_job(session, service.tenant, status=JobStatus.RUNNING, training_file=file_id, adapter=adapter).id


def end(service: Service, job_id: str, status: JobStatus) -> None:
    with service.sessions.begin() as session:
        session.query(Job).filter_by(id=job_id).one().status = status
        add_event(session, job_id, message="ended")


def test_the_loop_of_the_documentation(service: Service, client: OpenAI, job_id: str) -> None:
    job = client.fine_tuning.jobs.retrieve(job_id)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.fine_tuning.jobs.retrieve, job_id, extra_query={"wait": 60}, timeout=90)
        end(service, job_id, JobStatus.FAILED)
        job = waiting.result(timeout=20)
    assert job.status == "failed"


def test_a_tag_of_the_raw_response(service: Service, client: OpenAI, job_id: str) -> None:
    tag = client.fine_tuning.jobs.with_raw_response.retrieve(job_id).headers["etag"]
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.retrieve(job_id, extra_headers={"If-None-Match": tag})
    assert caught.value.status_code == 304
    end(service, job_id, JobStatus.SUCCEEDED)
    assert client.fine_tuning.jobs.retrieve(job_id, extra_headers={"If-None-Match": tag}).status == "succeeded"


def test_events_from_the_last_one_on(service: Service, client: OpenAI, job_id: str) -> None:
    with service.sessions.begin() as session:
        for number in range(5):
            add_event(session, job_id, message=str(number))
    ascending: Any = {"order": "asc"}
    first = client.fine_tuning.jobs.list_events(job_id, limit=2, extra_query=ascending)
    rest = client.fine_tuning.jobs.list_events(job_id, after=first.data[-1].id, limit=10, extra_query=ascending)
    assert [event.message for event in [*first.data, *rest.data]] == ["0", "1", "2", "3", "4"]


def test_jobs_made_of_jobs(service: Service, client: OpenAI, job_id: str) -> None:
    end(service, job_id, JobStatus.FAILED)
    again = client.post(f"{JOBS}/{job_id}/retry", cast_to=FineTuningJob)
    wider = client.post(f"{JOBS}/{job_id}/clone", body={"peft": {"r": 16}}, cast_to=FineTuningJob)
    listed = {job.id: job for job in client.fine_tuning.jobs.list()}
    assert (listed[again.id], listed[wider.id]) == (again, wider)
    assert again.model_extra is not None
    assert again.model_extra["origin_job"] == job_id
    assert wider.model_extra is not None
    assert wider.model_extra["adapter"]["r"] == 16
    client.delete(f"{JOBS}/{job_id}", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(job_id)


def test_a_trial_through_the_client(service: Service, client: OpenAI, job_id: str) -> None:
    file_id = client.fine_tuning.jobs.retrieve(job_id).training_file
    plan = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_query={"dry_run": True})
    assert plan.object == "fine_tuning.job.plan"
    assert [job.id for job in client.fine_tuning.jobs.list()] == [job_id]
