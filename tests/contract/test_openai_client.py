"""The official client's own habits, those that were found to break other servers."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI

from api.jobs.models import Job, JobStatus
from tests.api.engine import START, delta
from tests.api.rows import add_adapter, add_job
from tests.api.support import NO_TLS, Service

ROWS = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
HI: list[Any] = [{"role": "user", "content": "hi"}]


def test_a_model_name_with_a_slash_arrives_percent_encoded(service: Service, client: OpenAI) -> None:
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, model="org/slashed")
        name = add_adapter(session, service.tenant, job).id
    raw = client.models.with_raw_response.retrieve(name)
    assert "%2F" in str(raw.http_request.url)
    assert raw.parse().id == name
    assert client.chat.completions.create(model=name, messages=HI).model == name
    assert client.models.delete(name).deleted


def test_ended_jobs_and_used_files_are_asked_about_once(service: Service) -> None:
    client = service.client(max_retries=2)
    file = client.files.create(file=ROWS, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    attempts = []
    for call in (lambda: client.files.delete(file.id), lambda: client.fine_tuning.jobs.cancel(job.id)):
        try:
            call()
        except openai.APIStatusError as error:
            attempts.append(error.request.headers["x-stainless-retry-count"])
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(job.id)
    assert [*attempts, caught.value.request.headers["x-stainless-retry-count"]] == ["0", "0"]


def test_a_refusal_has_a_message_a_code_and_a_parameter(client: OpenAI) -> None:
    wrong: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file="file-x", method=wrong)
    assert caught.value.param == "method.supervised.hyperparameters.n_epochs"
    assert caught.value.code == "invalid_value"
    assert caught.value.type == "invalid_request_error"
    assert "expected 'auto' or greater than or equal to 1" in caught.value.message


def test_an_iteration_asks_for_no_page_too_many(service: Service, client: OpenAI) -> None:
    with service.sessions.begin() as session:
        for _ in range(4):
            add_job(session, service.tenant)
    page = client.fine_tuning.jobs.list(limit=2)
    pages = list(page.iter_pages())
    assert [len(page.data) for page in pages] == [2, 2]
    assert not pages[-1].has_next_page()


def test_our_extensions_need_no_other_client(service: Service, client: OpenAI) -> None:
    file = client.files.create(file=ROWS, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, extra_body={"peft": {"method": "uora", "r": 8}}
    )
    assert job.model_extra is not None
    assert job.model_extra["adapter"]["r"] == 8
    assert job.model_extra["progress"] is None
    for key in ("rank", "type"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"peft": {key: 8}})
        assert caught.value.param == f"peft.{key}"


def test_pause_and_resume_as_the_client_has_them(service: Service) -> None:
    """Without a body, answered by the job; a status that is not in the client's enum arrives all the same."""
    client = service.client(max_retries=2)
    file = client.files.create(file=ROWS, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    with service.sessions.begin() as session:
        session.query(Job).filter_by(id=job.id).update({"status": JobStatus.QUEUED})
    raw = client.fine_tuning.jobs.with_raw_response.pause(job.id)
    assert raw.http_request.content == b""
    assert (raw.parse().id, raw.parse().status) == (job.id, "paused")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.resume(job.id)
    assert caught.value.code == "job_not_resumable"
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"


def test_a_sweep_needs_no_other_client(client: OpenAI) -> None:
    training, validation = (client.files.create(file=ROWS, purpose="fine-tune").id for _ in range(2))
    body = {"model": "tiny", "training_file": training, "validation_file": validation, "sweep": {"seeds": [1, 2]}}
    made = client.post("/fine_tuning/sweeps", cast_to=httpx.Response, body=body).json()
    assert [client.fine_tuning.jobs.retrieve(job_id).seed for job_id in made["jobs"]] == [1, 2]
    assert client.get(f"/fine_tuning/sweeps/{made['id']}", cast_to=httpx.Response).json() == made
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/fine_tuning/sweeps", cast_to=httpx.Response, body=body | {"validation_file": None})
    assert (caught.value.param, caught.value.code) == ("validation_file", "missing_required_parameter")


def test_a_failed_generation_is_raised_in_the_middle_of_a_stream(service: Service, client: OpenAI) -> None:
    service.engine.lines = [START, delta("Hel"), {"type": "error", "code": "engine_fault", "message": "lost"}]
    heard = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012
        for chunk in client.chat.completions.create(model="tiny", messages=HI, stream=True):
            heard.append(chunk.choices[0].delta.content)
    assert (heard, caught.value.code) == (["", "Hel"], "engine_fault")


def test_the_streaming_helper_builds_the_whole_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=HI) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"
    assert final.choices[0].finish_reason == "stop"


def test_the_async_client(service: Service) -> None:
    async def use() -> str:
        transport = DefaultAsyncHttpxClient(verify=NO_TLS)
        url, key = f"{service.url}/v1", service.tenant.key
        async with AsyncOpenAI(base_url=url, api_key=key, http_client=transport, max_retries=0) as client:
            file = await client.files.create(file=ROWS, purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
            assert [found.id async for found in client.fine_tuning.jobs.list(limit=1)] == [job.id]
            stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(use()) == "Hello"


def test_many_at_once(service: Service) -> None:
    """Uploads, jobs, lists and answers side by side: on SQLite all writers share one lock."""
    client = service.client()

    def work(_number: int) -> str:
        file = client.files.create(file=ROWS, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        client.fine_tuning.jobs.list()
        client.chat.completions.create(model="tiny", messages=HI)
        return client.fine_tuning.jobs.cancel(job.id).id

    with ThreadPoolExecutor(12) as pool:
        ids = list(pool.map(work, range(24)))
    assert len(set(ids)) == 24
    jobs = list(client.fine_tuning.jobs.list(limit=10))
    assert {job.id for job in jobs} == set(ids)
    assert {job.status for job in jobs} == {"cancelled"}
    assert sorted(job_id for _, job_id in service.queue.messages) == sorted(ids)
