"""The ledger: all that is used is in it once, and comes out as OpenAI's client and spreadsheets read it."""

from __future__ import annotations

import asyncio
import csv
import io
import random
import time
from itertools import pairwise
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api.caller import Caller
from api.jobs.models import Job, JobStatus
from api.jobs.repository import move_job
from api.scopes import Scope
from api.usage import repository
from api.usage.ledger import UsageLedger
from api.usage.models import Operation, UsageRecord
from api.usage.repository import Amounts, UsageKey, present_minute
from api.usage.service import CSV_HEADER
from tests.api.engine import CLASSES, START, delta, finish
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service, Tenant, wait_until
from tests.api.test_keys import administrator, key_with

HELLO: Any = [{"role": "user", "content": "hi"}]
#: Midnight.
DAY = 1_700_006_400


def records(service: Service, **by: str) -> list[UsageRecord]:
    with service.sessions() as session:
        return session.query(UsageRecord).filter_by(project_id=service.tenant.project_id, **by).all()


def used(service: Service, *names: str, **by: str) -> tuple[float, ...]:
    """Sums of the columns."""
    return tuple(sum(getattr(record, name) for record in records(service, **by)) for name in names)


def put(service: Service, minute: int, *, tenant: Tenant | None = None, **values: Any) -> None:
    """A row of the ledger."""
    of = {"key_id": "key_a", "model": "tiny", "operation": "chat"} | values
    names = {name: of.pop(name) for name in ("key_id", "model", "operation")}
    key = UsageKey((tenant or service.tenant).project_id, minute, **names)
    with service.sessions.begin() as session:
        repository.add(session, {key: Amounts(**of)})


class TestInference:
    def test_the_ledger_has_what_the_answers_say(self, service: Service, client: OpenAI) -> None:
        answers = [client.chat.completions.create(model="tiny", messages=HELLO) for _ in range(3)]
        service.engine.lines = [START, delta("a"), delta("b", index=1), finish(tokens=3), finish(index=1, tokens=4)]
        answers.append(client.completions.create(model="tiny", prompt="x", n=2))
        *_, last = client.chat.completions.create(
            model="tiny", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
        )
        expected = [
            sum(getattr(a.usage, name) for a in [*answers, last]) for name in ("prompt_tokens", "completion_tokens")
        ]
        wait_until(lambda: used(service, "requests") == (5,))
        assert used(service, "input_tokens", "output_tokens") == tuple(expected)
        assert used(service, "requests", "output_tokens", operation="completion") == (1, 7)
        assert {record.model for record in records(service)} == {"tiny"}

    def test_what_a_client_did_not_wait_for_is_counted_as_far_as_it_came(
        self, service: Service, client: OpenAI
    ) -> None:
        said = [START, *(delta("x") | {"completion_tokens": number} for number in (1, 2, 5))]
        service.engine.lines = [*said, *(delta("y") | {"completion_tokens": 900} for _ in range(200))]
        service.engine.pause_seconds = 0.05
        with client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.content == "x":
                    break
        wait_until(lambda: service.engine.cancelled == 1)
        wait_until(lambda: used(service, "requests") == (1,))
        input_tokens, output_tokens = used(service, "input_tokens", "output_tokens")
        assert input_tokens == 7
        assert 1 <= output_tokens <= 900

    def test_a_refused_request_is_not_counted(self, service: Service, client: OpenAI) -> None:
        service.engine.refusal = (503, {"error": {"code": "engine_busy", "message": "no"}})
        with pytest.raises(Exception, match="busy"):
            client.chat.completions.create(model="tiny", messages=HELLO)
        service.engine.refusal = None
        client.completions.create(model="tiny", prompt="x")
        wait_until(lambda: bool(records(service)))
        assert used(service, "requests", "input_tokens") == (1, 7)

    def test_classifications_count_their_items(self, service: Service) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, task="classification")
            name = add_adapter(session, service.tenant, job).id
        service.engine.classes = CLASSES | {"probabilities": [[0.5, 0.5], [0.1, 0.9]]}
        answer = service.http().post("/v1/classify", json={"model": name, "input": ["a", "b"]})
        assert answer.status_code == 200, answer.text
        wait_until(lambda: bool(records(service)))
        names = ("requests", "items", "input_tokens", "output_tokens")
        assert used(service, *names, operation="classification", model=name) == (1, 2, 5, 0)


class TestLedger:
    """Against a database that fails."""

    @pytest.fixture
    def ledger(self, sessions: sessionmaker[Session]) -> UsageLedger:
        return UsageLedger(sessions)

    @pytest.fixture
    def caller(self, tenant: Tenant) -> Caller:
        return Caller(project_id=tenant.project_id, project_slug=tenant.slug, key_id="key_x")

    def sum_of(self, sessions: sessionmaker[Session], tenant: Tenant) -> int:
        with sessions() as session:
            rows = session.query(UsageRecord).filter_by(project_id=tenant.project_id)
            return sum(record.requests for record in rows)

    def test_many_writers_lose_and_double_nothing(
        self, sessions: sessionmaker[Session], tenant: Tenant, caller: Caller
    ) -> None:
        async def work() -> None:
            ledgers = [UsageLedger(sessions) for _ in range(4)]

            async def one(ledger: UsageLedger) -> None:
                for number in range(20):
                    for model in random.sample("abcdef", 6):  # as they come, not in an order that suits the locks
                        ledger.add(caller, model, Operation.CHAT, requests=1)
                    if number % 5 == 4:
                        assert await ledger.write()

            await asyncio.gather(*map(one, ledgers))

        asyncio.run(work())
        assert self.sum_of(sessions, tenant) == 4 * 20 * 6

    def test_a_failed_batch_is_written_later_and_once(
        self,
        sessions: sessionmaker[Session],
        tenant: Tenant,
        caller: Caller,
        ledger: UsageLedger,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Before the commit, and, which looks the same from here, after it."""
        commit = Session.commit
        fail = {"before": True, "after": True}

        def commit_and_fail(session: Session) -> None:
            if fail.pop("before", False):
                raise OperationalError("commit", {}, Exception("the connection was lost"))
            commit(session)
            if fail.pop("after", False):
                raise OperationalError("commit", {}, Exception("the answer was lost"))

        broken = sessionmaker(sessions.kw["bind"], class_=type("Broken", (Session,), {"commit": commit_and_fail}))

        class Opening:
            """``sessionmaker.begin`` commits the transaction, not the session."""

            def begin(self) -> Any:
                return self

            def __enter__(self) -> Session:
                self.session = broken()
                return self.session

            def __exit__(self, kind: object, *_: object) -> None:
                try:
                    if kind is None:
                        self.session.commit()
                finally:
                    self.session.close()

        monkeypatch.setattr(ledger, "_sessions", Opening())

        async def work() -> list[bool]:
            ledger.add(caller, "tiny", Operation.CHAT, requests=5)
            first = await ledger.write()
            ledger.add(caller, "tiny", Operation.CHAT, requests=2)
            return [first, *[await ledger.write() for _ in range(3)]]

        assert asyncio.run(work()) == [False, False, True, True]
        assert self.sum_of(sessions, tenant) == 7

    def test_a_process_that_stops_writes_the_rest(
        self, sessions: sessionmaker[Session], tenant: Tenant, caller: Caller, ledger: UsageLedger
    ) -> None:
        async def work() -> None:
            async with ledger.open():
                ledger.add(caller, "tiny", Operation.CHAT, requests=3)

        began = time.monotonic()
        asyncio.run(work())
        assert self.sum_of(sessions, tenant) == 3
        assert time.monotonic() - began < 5


class TestTraining:
    @pytest.mark.parametrize("end", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
    def test_an_end_counts_what_was_trained(self, service: Service, end: JobStatus) -> None:
        with service.sessions.begin() as session:
            job = add_job(
                session, service.tenant, status=JobStatus.RUNNING, run_tokens=90, run_seconds=1.5, key_id="key_j"
            )
            assert move_job(session, job.id, source=JobStatus.RUNNING, target=end)
            job_id = job.id
        assert used(service, "trained_tokens", "seconds", job_id=job_id, key_id="key_j", operation="training") == (
            90,
            1.5,
        )

    def test_a_resumed_job_is_counted_for_what_came_after(self, service: Service) -> None:
        with service.sessions.begin() as session:
            job_id = add_job(session, service.tenant, status=JobStatus.RUNNING, run_tokens=90, run_seconds=1.5).id
            move_job(session, job_id, source=JobStatus.RUNNING, target=JobStatus.FAILED)
        with service.sessions.begin() as session:
            move_job(session, job_id, source=JobStatus.FAILED, target=JobStatus.QUEUED, run_tokens=130, run_seconds=2.0)
            move_job(session, job_id, source=JobStatus.QUEUED, target=JobStatus.CANCELLED)
        assert used(service, "trained_tokens", "seconds", job_id=job_id) == (130, 2.0)

    def test_a_job_knows_its_key(self, service: Service, client: OpenAI) -> None:
        with service.sessions.begin() as session:
            file_id = add_file(session, service.tenant).id
        job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
        with service.sessions() as session:
            key_id = session.query(Job.key_id).filter_by(id=job_id).scalar()
        assert key_id is not None
        assert key_id.startswith("key_")


class TestReading:
    def test_completions_as_the_client_reads_them(self, service: Service) -> None:
        put(service, DAY, requests=1, input_tokens=10, output_tokens=5)
        put(service, DAY + 60, requests=2, input_tokens=1, operation="completion", model="other")
        put(service, DAY + 86_400, requests=4, key_id="key_b")
        put(service, DAY + 60, requests=99, operation="classification")
        put(service, DAY, requests=1000, tenant=service.stranger)
        completions = administrator(service).usage.completions

        page = completions(start_time=DAY, end_time=DAY + 3 * 86_400)
        assert [(b.start_time, b.end_time, len(b.results)) for b in page.data] == [
            (DAY, DAY + 86_400, 1),
            (DAY + 86_400, DAY + 2 * 86_400, 1),
            (DAY + 2 * 86_400, DAY + 3 * 86_400, 0),
        ]
        result = page.data[0].results[0]
        assert (result.num_model_requests, result.input_tokens, result.output_tokens) == (3, 11, 5)
        assert (result.model, result.project_id, page.has_more, page.next_page) == (None, None, False, None)

        hours = completions(start_time=DAY, end_time=DAY + 7200, bucket_width="1h", group_by=["model", "project_id"])
        found = [(r.model, r.project_id, r.num_model_requests) for b in hours.data for r in b.results]
        assert found == [("other", service.tenant.project_id, 2), ("tiny", service.tenant.project_id, 1)]

        def requests(**filters: Any) -> int:
            page = completions(start_time=DAY, end_time=DAY + 3 * 86_400, **filters)
            return sum(result.num_model_requests for bucket in page.data for result in bucket.results)

        assert requests(api_key_ids=["key_b"]) == 4
        assert requests(models=["other", "none"]) == 2
        assert requests(project_ids=[service.stranger.project_id]) == 0

    def test_an_organization_wide_key_sees_all_projects(self, service: Service) -> None:
        both = {service.tenant.project_id: 1, service.stranger.project_id: 2}
        put(service, DAY, requests=1)
        put(service, DAY, requests=2, tenant=service.stranger)
        completions = administrator(service, organization_wide=True).usage.completions
        page = completions(start_time=DAY, end_time=DAY + 60, bucket_width="1m", group_by=["project_id"])
        found = {r.project_id: r.num_model_requests for r in page.data[0].results}
        assert {project: found[project] for project in both} == both
        page = completions(start_time=DAY, end_time=DAY + 60, project_ids=[service.stranger.project_id])
        assert page.data[0].results[0].num_model_requests == 2

    @pytest.mark.parametrize(("width", "limit"), [("1m", 700), ("1h", 11), ("1d", 1)])
    def test_pages_partition_the_period(self, service: Service, width: str, limit: int) -> None:
        chosen = random.Random(width)
        minutes = [DAY + 60 * chosen.randrange(3 * 1440) for _ in range(40)]
        for minute in minutes:
            put(service, minute, requests=1)
        since, before = DAY + 7 * 60, DAY + 2 * 86_400 + 13 * 60
        params = {"start_time": since + 30, "end_time": before - 20, "bucket_width": width, "limit": limit}
        bounds, requests = [], 0
        http = service.http()
        while True:
            page = http.get("/v1/usage", params=params).json()
            bounds += [(bucket["start_time"], bucket["end_time"]) for bucket in page["data"]]
            requests += sum(result["requests"] for bucket in page["data"] for result in bucket["results"])
            if not page["has_more"]:
                break
            params["page"] = page["next_page"]
        assert requests == sum(since <= minute < before for minute in minutes)
        assert bounds[0][0] == since
        assert bounds[-1][1] == before
        assert all(first[1] == second[0] for first, second in pairwise(bounds))

    def test_a_project_sees_all_that_it_used_and_has_stored(self, service: Service) -> None:
        put(service, DAY, requests=1, input_tokens=3)
        put(service, DAY, operation="training", trained_tokens=50, seconds=2.25)
        put(service, DAY, requests=7, tenant=service.stranger)
        with service.sessions.begin() as session:
            add_file(session, service.tenant, bytes=100)
            add_file(session, service.tenant, bytes=10**6, deleted_at=add_file(session, service.stranger).created_at)
            artifact = add_adapter(session, service.tenant, add_job(session, service.tenant)).artifact
        http = service.http()
        page = http.get("/v1/usage", params={"start_time": DAY, "end_time": DAY + 60, "group_by[]": "operation"}).json()
        training, chat = sorted(page["data"][0]["results"], key=lambda result: result["requests"])
        assert (chat["operation"], chat["requests"], chat["input_tokens"]) == ("chat", 1, 3)
        assert (training["trained_tokens"], training["seconds"]) == (50, 2.25)
        stored = page["bytes_stored"]
        assert stored == {"files": 100, "uploads": 0, "models": len(artifact), "total": 100 + len(artifact)}
        only = http.get(
            "/v1/usage", params={"start_time": DAY, "end_time": DAY + 60, "operations[]": "training"}
        ).json()
        assert [result["requests"] for result in only["data"][0]["results"]] == [0]
        present = http.get("/v1/usage").json()
        assert present["data"][-1]["end_time"] == pytest.approx(present_minute() + 60, abs=60)

    def test_csv(self, service: Service) -> None:
        put(service, DAY, requests=1, input_tokens=3, output_tokens=4)
        put(service, DAY + 60, requests=1, input_tokens=3, model="=cmd()", key_id="key,b")
        put(service, DAY + 40 * 86_400, operation="training", trained_tokens=9, seconds=0.5)
        http = service.http()
        params = {"start_time": DAY, "end_time": DAY + 50 * 86_400}
        answer = http.get("/v1/usage.csv", params=params)
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.text == http.get("/v1/usage", params=params, headers={"Accept": "text/csv"}).text
        header, *lines = csv.reader(io.StringIO(answer.text))
        assert header == list(CSV_HEADER)
        first = ["2023-11-15T00:00:00Z", "2023-11-16T00:00:00Z"]
        assert lines == [
            [*first, "key,b", "'=cmd()", "chat", "1", "3", "0", "0", "0", "0.0"],
            [*first, "key_a", "tiny", "chat", "1", "3", "4", "0", "0", "0.0"],
            ["2023-12-25T00:00:00Z", "2023-12-26T00:00:00Z", "key_a", "tiny", "training", *"0009", "0", "0.5"],
        ]

    @pytest.mark.parametrize(
        ("params", "param"),
        [
            ({"start_time": DAY, "end_time": DAY}, "end_time"),
            ({"start_time": DAY, "bucket_width": "2d"}, "bucket_width"),
            ({"start_time": DAY, "limit": 32}, "limit"),
            ({"start_time": DAY, "limit": 0}, "limit"),
            ({"start_time": -1}, "start_time"),
            ({"start_time": DAY, "page": "page_1"}, "page"),
            ({"start_time": DAY, "page": "\u00b2"}, "page"),
            ({"start_time": DAY, "group_by[]": "user_id"}, "group_by"),
            ({"start_time": DAY, "user_ids[]": "u"}, "user_ids[]"),
            ({}, "start_time"),
        ],
    )
    def test_what_cannot_be_asked(self, service: Service, params: dict[str, Any], param: str) -> None:
        answer = service.http().get("/v1/organization/usage/completions", params=params)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert param in f"{error['param']} {error['message']}"

    def test_scopes(self, service: Service) -> None:
        def status(path: str, scope: Scope) -> int:
            headers = {"Authorization": f"Bearer {key_with(service, scope)}"}
            return service.http().get(path, params={"start_time": DAY}, headers=headers).status_code

        assert status("/v1/usage", Scope.READ) == 200
        assert status("/v1/usage", Scope.ADMIN) == 403
        assert status("/v1/organization/usage/completions", Scope.READ) == 403


def test_reading_a_period_uses_an_index(service: Service) -> None:
    """However many other projects there are."""
    if service.database.dialect.name != "sqlite":
        pytest.skip("PostgreSQL plans by the sizes of tables")
    with service.sessions() as session:
        plan = session.execute(
            text("EXPLAIN QUERY PLAN SELECT sum(requests) FROM usage_records WHERE project_id = 'p' AND minute > 5")
        ).all()
    assert "USING INDEX" in str(plan)
