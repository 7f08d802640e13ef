"""Quotas: what is over is refused exactly, what is refused leaves nothing, and the client knows when to come again."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import SecretStr

from api.caller import Caller
from api.jobs.models import Job, JobStatus
from api.projects.models import Project
from api.queue import TaskName
from api.quotas import limiting, repository
from api.quotas import service as quotas
from api.quotas.limiting import RateLimits
from api.quotas.models import Quotas
from api.scopes import Scope
from api.settings import Settings
from tests.api.engine import START, delta, finish
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service, empty_broker, wait_until
from tests.api.test_keys import administrator, code_of, http, key_with, wait_until_forgotten

HELLO: Any = [{"role": "user", "content": "hi"}]


def limit(service: Service, **quotas: int) -> None:
    """Give the first project quotas of its own, before its key is used."""
    with service.sessions.begin() as session:
        session.query(Project).filter_by(id=service.tenant.project_id).update(quotas)


def create(service: Service, file_id: str, **values: Any) -> httpx.Response:
    return service.http().post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id} | values)


@pytest.fixture
def file_id(service: Service) -> str:
    with service.sessions.begin() as session:
        return add_file(session, service.tenant).id


def count(service: Service, **by: str) -> int:
    with service.sessions() as session:
        return session.query(Job).filter_by(project_id=service.tenant.project_id, **by).count()


def slowly(counting: Callable[..., Any]) -> Callable[..., Any]:
    """Counts, and leaves time for others to do so before anything comes of it."""

    def count_slowly(*args: Any) -> Any:
        found = counting(*args)
        time.sleep(0.05)
        return found

    return count_slowly


def together(ask: Callable[[int], httpx.Response]) -> list[int]:
    """Eight requests at once, each a different one, since equal ones would wait for one another; their statuses in
    order."""
    with ThreadPoolExecutor(8) as pool:
        return sorted(answer.status_code for answer in pool.map(ask, range(8)))


class TestQueuedJobs:
    def test_one_more_is_refused_until_there_is_room(self, service: Service, client: OpenAI, file_id: str) -> None:
        limit(service, jobs_queued=2)
        first = create(service, file_id).json()["id"]
        assert create(service, file_id).status_code == 200
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as refused:
            service.client(max_retries=3).fine_tuning.jobs.create(model="tiny", training_file=file_id)
        assert time.monotonic() - began < 2, "the client was told not to try again"
        assert refused.value.code == "job_quota_exceeded"
        assert "Found 2 jobs" in refused.value.message
        assert "cancel" in refused.value.message
        client.fine_tuning.jobs.cancel(first)
        assert create(service, file_id).status_code == 200

    def test_those_that_run_or_are_paused_are_not_in_the_queue(self, service: Service, file_id: str) -> None:
        limit(service, jobs_queued=1)
        with service.sessions.begin() as session:
            add_job(session, service.tenant, status=JobStatus.RUNNING)
            paused = add_job(session, service.tenant, status=JobStatus.PAUSED).id
            add_job(session, service.stranger, status=JobStatus.QUEUED)
        assert create(service, file_id).status_code == 200
        resumed = service.http().post(f"/v1/fine_tuning/jobs/{paused}/resume")
        assert code_of(resumed) == "job_quota_exceeded"
        assert count(service, status=JobStatus.PAUSED) == 1

    def test_a_sweep_counts_all_its_jobs(self, service: Service, file_id: str) -> None:
        limit(service, jobs_queued=4)
        body = {"model": "tiny", "training_file": file_id, "validation_file": file_id}
        answer = service.http().post("/v1/fine_tuning/sweeps", json=body | {"sweep": {"seeds": [1, 2, 3, 4, 5]}})
        assert answer.status_code == 429
        assert "and 5 more; expected 4" in answer.json()["error"]["message"]
        assert count(service) == 0
        answer = service.http().post("/v1/fine_tuning/sweeps", json=body | {"sweep": {"seeds": [1, 2, 3, 4]}})
        assert answer.status_code == 200, answer.text
        assert create(service, file_id).status_code == 429

    def test_no_more_come_in_together_than_one_by_one(
        self, service: Service, file_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(repository, "count_jobs", slowly(repository.count_jobs))
        limit(service, jobs_queued=3)
        assert together(lambda seed: create(service, file_id, seed=seed)) == [200] * 3 + [429] * 5
        assert count(service) == 3


class TestBytes:
    def upload(self, service: Service, size: int, name: str = "x.txt") -> httpx.Response:
        files = {"file": (name, b"x" * size)}
        return service.http().post("/v1/files", data={"purpose": "user_data"}, files=files)

    def test_a_file_over_it_leaves_nothing(self, service: Service) -> None:
        limit(service, bytes_stored=1000)
        assert self.upload(service, 600).status_code == 200
        answer = self.upload(service, 401)
        assert answer.status_code == 429
        assert code_of(answer) == "storage_quota_exceeded"
        assert "Found 600 bytes of this project, and 401 more; expected 1000" in answer.json()["error"]["message"]
        assert len(service.stored_files()) == 1
        assert self.upload(service, 400).status_code == 200

    @pytest.mark.parametrize("path", ["/v1/files", "/v1/models", "/v1/uploads/{upload}/parts"])
    def test_a_body_that_is_too_large_by_its_length_is_not_read(
        self, service: Service, client: OpenAI, path: str
    ) -> None:
        """The answer is there while nothing of the body was sent."""
        limit(service, bytes_stored=1000)
        upload = client.uploads.create(bytes=900, filename="x", mime_type="text/plain", purpose="user_data")
        server = urlsplit(service.url)
        with socket.create_connection((server.hostname, server.port), timeout=10) as connection:
            head = (
                f"POST {path.format(upload=upload.id)} HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {service.tenant.key}",
                "Content-Type: multipart/form-data; boundary=x",
                "Content-Length: 100000",
                "Connection: close",
            )
            connection.sendall("\r\n".join((*head, "", "")).encode())
            answer = connection.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 429 ")
        assert "storage_quota_exceeded" in answer
        assert service.stored_files() == []

    def test_models_and_parts_count(self, service: Service, client: OpenAI) -> None:
        limit(service, bytes_stored=100)
        with service.sessions.begin() as session:
            model = add_adapter(session, service.tenant, add_job(session, service.tenant))
        room = 100 - len(model.artifact)
        with pytest.raises(openai.RateLimitError, match="bytes_stored"):
            client.uploads.create(bytes=room + 1, filename="x", mime_type="text/plain", purpose="user_data")
        upload = client.uploads.create(bytes=room, filename="x", mime_type="text/plain", purpose="user_data")
        part = client.uploads.parts.create(upload.id, data=b"x" * (room - 10))
        assert self.upload(service, 11).status_code == 429
        last = client.uploads.parts.create(upload.id, data=b"x" * 10)
        with pytest.raises(openai.RateLimitError):
            client.uploads.parts.create(upload.id, data=b"x")
        client.uploads.complete(upload.id, part_ids=[part.id, last.id])  # its bytes are there already
        assert len(service.stored_files()) == 1
        assert self.upload(service, 1).status_code == 429

    def test_no_more_come_in_together_than_one_by_one(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quotas, "bytes_stored", slowly(quotas.bytes_stored))
        limit(service, bytes_stored=300)
        assert together(lambda number: self.upload(service, 100, name=f"{number}.txt")) == [200] * 3 + [429] * 5
        assert len(service.stored_files()) == 3


class TestRates:
    def ask(self, service: Service, **values: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": HELLO} | values
        return service.http().post("/v1/chat/completions", json=body)

    def test_requests_per_minute(self, service: Service) -> None:
        limit(service, requests_per_minute=2)
        first = self.ask(service)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert 50 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert "x-ratelimit-limit-tokens" not in first.headers
        bad = self.ask(service, temperature=9)
        assert (bad.status_code, bad.headers["x-ratelimit-remaining-requests"]) == (400, "0")
        refused = self.ask(service)
        assert refused.status_code == 429
        assert code_of(refused) == "rate_limit_exceeded"
        assert 50 < int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert service.http().get("/v1/files").status_code == 200, "only models are asked so often"
        assert "x-ratelimit-limit-requests" not in self.ask_stranger(service).headers

    def ask_stranger(self, service: Service) -> httpx.Response:
        answer = service.http(service.stranger).post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert answer.status_code == 200
        return answer

    def test_tokens_per_minute_are_those_of_the_answers(self, service: Service) -> None:
        limit(service, tokens_per_minute=20)
        service.engine.lines = [START, delta("x"), finish(tokens=5)]
        assert self.ask(service).headers["x-ratelimit-remaining-tokens"] == "20"
        streamed = self.ask(service, stream=True)
        assert streamed.headers["x-ratelimit-remaining-tokens"] == "8"
        refused = self.ask(service)
        assert refused.status_code == 429
        assert "20 tokens per minute" in refused.json()["error"]["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        uses = {use["name"]: use for use in service.http().get("/v1/usage/quotas").json()["data"]}
        assert (uses["tokens_per_minute"]["limit"], uses["tokens_per_minute"]["used"]) == (20, 20)
        assert uses["requests_per_minute"]["used"] is None

    def test_the_client_waits_and_succeeds(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limiting, "WINDOW_SECONDS", 2)
        limit(service, requests_per_minute=1)
        client = service.client(max_retries=2)
        answers = [client.chat.completions.create(model="tiny", messages=HELLO) for _ in range(2)]
        assert [answer.choices[0].message.content for answer in answers] == ["Hello", "Hello"]
        assert len(service.engine.requests) == 2


class TestCounting:
    """In Redis, by all processes together; without it, not at all."""

    CALLER = Caller("proj_x", "x", "key_x", quotas=Quotas(requests_per_minute=3, tokens_per_minute=100))

    def settings(self, folder: Path, url: str) -> Settings:
        return Settings(_env_file=None, home=folder, engine_token=SecretStr("x"), broker_url=url)

    @pytest.mark.postgres
    def test_processes_share_the_count(self, tmp_path: Path) -> None:
        async def work(settings: Settings) -> list[str]:
            async with RateLimits.open(settings) as one, RateLimits.open(settings) as other:
                seen = [await limits.admit(self.CALLER) for limits in (one, other, one)]
                with pytest.raises(Exception, match="3 requests per minute"):
                    await other.admit(self.CALLER)
                await one.spend(self.CALLER, 150)
                assert (await other.windows(self.CALLER))["tokens"].remaining == 0
                return [headers["x-ratelimit-remaining-requests"] for headers in seen]

        with empty_broker() as url:
            assert asyncio.run(work(self.settings(tmp_path, url))) == ["2", "1", "0"]

    def test_a_redis_that_is_away_limits_nobody(self, tmp_path: Path) -> None:
        async def work() -> list[dict[str, str]]:
            async with RateLimits.open(self.settings(tmp_path, "redis://127.0.0.1:1/0")) as limits:
                await limits.spend(self.CALLER, 1000)
                return [await limits.admit(self.CALLER) for _ in range(10)]

        began = time.monotonic()
        assert asyncio.run(work()) == [{}] * 10
        assert time.monotonic() - began < 3


class TestChanging:
    PATH = "/v1/organization/projects/{}/quotas"

    def test_a_project_lowers_its_quotas_and_does_not_raise_them(self, service: Service) -> None:
        path = self.PATH.format(service.tenant.project_id)
        own, organization = service.http(), http(service, key_with(service, Scope.ADMIN, organization_wide=True))
        assert own.get(path).json()["own"] == []
        assert own.post(path, json={"jobs_queued": 7, "tokens_per_minute": 500}).json()["jobs_queued"] == 7
        for raised in ({"jobs_queued": 8}, {"jobs_queued": 0}, {"tokens_per_minute": None}):
            answer = own.post(path, json=raised)
            assert (answer.status_code, code_of(answer)) == (403, "organization_key_required")
        shown = organization.post(path, json={"jobs_queued": 8, "tokens_per_minute": None}).json()
        assert (shown["jobs_queued"], shown["tokens_per_minute"], shown["own"]) == (8, 0, ["jobs_queued"])
        assert own.get(path).json() == shown
        (entry,) = administrator(service).audit_logs.list(event_types=["quotas.updated"], limit=1).data
        assert entry.type == "quotas.updated"
        for bad in ({}, {"jobs_queued": -1}, {"jobs": 1}):
            assert own.post(path, json=bad).status_code == 400

    def test_a_change_holds_within_a_second(self, service: Service, file_id: str) -> None:
        path = self.PATH.format(service.tenant.project_id)
        assert create(service, file_id).status_code == 200
        assert service.http().post(path, json={"jobs_queued": 1}).status_code == 200
        wait_until_forgotten()
        assert create(service, file_id).status_code == 429

    def test_rate_limits_as_the_client_knows_them(self, service: Service) -> None:
        rate_limits = administrator(service, organization_wide=True).projects.rate_limits
        project = service.tenant.project_id
        (found,) = rate_limits.list_rate_limits(project)
        assert (found.model, found.max_requests_per_1_minute, found.max_tokens_per_1_minute) == ("*", 0, 0)
        changed = rate_limits.update_rate_limit(found.id, project_id=project, max_requests_per_1_minute=9)
        assert (changed.max_requests_per_1_minute, changed.max_tokens_per_1_minute) == (9, 0)
        (found,) = rate_limits.list_rate_limits(project)
        assert found.max_requests_per_1_minute == 9

    def test_more_running_jobs_ring_for_those_that_waited(self, service: Service) -> None:
        limit(service, jobs_running=1)
        with service.sessions.begin() as session:
            add_job(session, service.tenant, status=JobStatus.RUNNING)
            waiting = [add_job(session, service.tenant, status=JobStatus.QUEUED).id for _ in range(2)]
        organization = http(service, key_with(service, Scope.ADMIN, organization_wide=True))
        organization.post(self.PATH.format(service.tenant.project_id), json={"jobs_running": 3})
        wait_until(lambda: len(service.queue.messages) == 2)
        assert service.queue.messages == [(TaskName.TRAIN, job_id) for job_id in waiting]

    def test_use_is_shown(self, service: Service, client: OpenAI) -> None:
        limit(service, jobs_queued=9, requests_per_minute=5)
        with service.sessions.begin() as session:
            add_job(session, service.tenant, status=JobStatus.QUEUED)
            add_file(session, service.tenant, bytes=70)
        client.chat.completions.create(model="tiny", messages=HELLO)
        uses = {
            use["name"]: (use["limit"], use["used"]) for use in service.http().get("/v1/usage/quotas").json()["data"]
        }
        assert uses == {
            "jobs_running": (0, 0),
            "jobs_queued": (9, 1),
            "bytes_stored": (0, 70),
            "requests_per_minute": (5, 1),
            "tokens_per_minute": (0, None),
        }


def test_settings_hold_where_a_project_has_no_quota_of_its_own() -> None:
    settings = Settings(_env_file=None, engine_token=SecretStr("x"), quota_jobs_queued=5, quota_bytes_stored=9)
    quotas = Quotas.of(Project(jobs_queued=None, bytes_stored=0, jobs_running=2), settings)
    assert quotas == Quotas(jobs_running=2, jobs_queued=5, bytes_stored=0)
