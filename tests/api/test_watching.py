"""What dashboards ask again and again: nothing is missed, and nothing is read twice."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, text, update
from sqlalchemy.orm import Session

from api.caller import CALLER_SECONDS
from api.database import new_id, now
from api.jobs import following
from api.jobs.models import Job, JobEvent, JobStatus
from api.jobs.repository import add_event, find_versions, move_job, request_cancel
from api.jobs.watching import Bodies
from api.projects.service import revoke_api_key
from tests.api.rows import add_adapter, add_job
from tests.api.support import ROOT, Service, wait_until

JOBS = "/v1/fine_tuning/jobs"
#: A wait that no test takes whole.
LONG = 50


@pytest.fixture
def job_id(service: Service) -> str:
    """A running job with an event."""
    with service.sessions.begin() as session:
        job = add_job(
            session, service.tenant, status=JobStatus.RUNNING, progress={"step": 1, "total_steps": 8, "train_loss": 2.0}
        )
        add_event(session, job.id, message="first")
        return job.id


def change(service: Service, job_id: str, **values: Any) -> None:
    """As a worker might."""
    with service.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def say(service: Service, job_id: str, message: str) -> str:
    """Add an event; its id."""
    with service.sessions.begin() as session:
        return add_event(session, job_id, message=message).id


@contextmanager
def statements() -> Iterator[list[str]]:
    """All that is sent to any database meanwhile, but for the key's check."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "api_keys" not in statement and not statement.startswith(("BEGIN", "PRAGMA")):
            sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@contextmanager
def in_background(call: Callable[[], httpx.Response]) -> Iterator[Future[httpx.Response]]:
    """A request that waits for its answer."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


class TestVersions:
    """Every write raises the version, whoever writes it."""

    def test_every_column(self, service: Service, job_id: str) -> None:
        columns = {column.name for column in Job.__table__.columns} - {"version", "seq"}
        assert len(columns) > 30
        with service.sessions.begin() as session:
            before = session.query(Job.version).filter_by(id=job_id).scalar()
            for count, column in enumerate(sorted(columns), start=1):
                session.execute(update(Job).where(Job.id == job_id).values({column: getattr(Job, column)}))
                assert session.query(Job.version).filter_by(id=job_id).scalar() == before + count, column

    def test_a_row_that_is_changed_as_an_object(self, service: Service, job_id: str) -> None:
        with service.sessions.begin() as session:
            job = session.query(Job).filter_by(id=job_id).one()
            before = job.version
            job.progress = {"step": 2, "total_steps": 8}
        with service.sessions.begin() as session:
            assert session.query(Job.version).filter_by(id=job_id).scalar() == before + 1

    def test_an_event(self, service: Service, job_id: str) -> None:
        key = (service.tenant.project_id, job_id)
        with service.sessions.begin() as session:
            before = find_versions(session, [job_id])[key]
            for message in ("a", "b"):
                add_event(session, job_id, message=message)
            session.flush()
            after = find_versions(session, [job_id])[key]
            assert (
                after.event_count == before.event_count + 2 == session.query(JobEvent).filter_by(job_id=job_id).count()
            )
            assert after.version > before.version

    def test_no_other_way_to_write_is_used(self) -> None:
        """Raw SQL and bulk inserts would pass by the mapping that raises versions and counts events."""
        sources = [path for folder in ("api", "worker") for path in (ROOT / folder).rglob("*.py")]
        found = [f"{path}: {call}" for path in sources for call in _suspect_calls(path.read_text())]
        assert not found
        sets_it = [str(path) for path in sources if "version=Job.version" in path.read_text()]
        assert sets_it == [str(ROOT / "worker" / "lease.py")]  # a renewal, which shows nobody anything


def _suspect_calls(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name.startswith("bulk_"):
            yield name
        arguments = [ast.unparse(argument) for argument in node.args]
        if name in ("text", "exec_driver_sql") and any(_writes(argument) for argument in arguments):
            yield f"{name}({arguments})"
        if name in ("insert", "delete", "update") and arguments[:1] == ["JobEvent"]:
            yield f"{name}(JobEvent)"


def _writes(statement: str) -> bool:
    return any(word in statement.upper() for word in ("UPDATE ", "INSERT ", "DELETE "))


class TestTags:
    """ETag and If-None-Match"""

    def test_a_job(self, service: Service, job_id: str) -> None:
        http = service.http()
        first = http.get(f"{JOBS}/{job_id}")
        tag = {"If-None-Match": first.headers["etag"]}
        assert first.headers["cache-control"] == "private, no-cache"
        same = http.get(f"{JOBS}/{job_id}", headers=tag)
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag["If-None-Match"])
        change(service, job_id, progress={"step": 2, "total_steps": 8})
        other = http.get(f"{JOBS}/{job_id}", headers=tag)
        assert other.json()["progress"] == {"percent": 25.0, "step": 2, "total_steps": 8}
        assert other.headers["etag"] != tag["If-None-Match"]

    @pytest.mark.parametrize("form", ["W/{}", '"x", {}', "*"])
    def test_forms_of_the_header(self, service: Service, job_id: str, form: str) -> None:
        http = service.http()
        tag = http.get(f"{JOBS}/{job_id}").headers["etag"]
        assert http.get(f"{JOBS}/{job_id}", headers={"If-None-Match": form.format(tag)}).status_code == 304

    def test_a_tag_opens_no_other_project(self, service: Service, job_id: str) -> None:
        tag = service.http().get(f"{JOBS}/{job_id}").headers["etag"]
        for path in (f"{JOBS}/{job_id}", f"{JOBS}/{job_id}/events"):
            for header in (tag, "*"):
                answer = service.http(service.stranger).get(path, headers={"If-None-Match": header})
                assert answer.status_code == 404

    def test_no_row_is_touched_for_what_the_client_has(self, service: Service, job_id: str) -> None:
        http = service.http()
        for path in (f"{JOBS}/{job_id}", f"{JOBS}/{job_id}/events", f"{JOBS}/states?ids={job_id}"):
            tag = http.get(path).headers["etag"]
            with statements() as sent:
                assert http.get(path, headers={"If-None-Match": tag}).status_code == 304
            assert len(sent) == 1, sent
            assert "progress" not in sent[0]
            assert "job_events" not in sent[0]
        with statements() as sent:
            assert http.get(f"{JOBS}/{job_id}").status_code == 200
        assert len(sent) == 1, sent  # the answer of this version was made before

    def test_events(self, service: Service, job_id: str) -> None:
        http = service.http()
        tag = {"If-None-Match": http.get(f"{JOBS}/{job_id}/events").headers["etag"]}
        change(service, job_id, progress={"step": 2, "total_steps": 8})
        assert http.get(f"{JOBS}/{job_id}/events", headers=tag).status_code == 304
        say(service, job_id, "second")
        answer = http.get(f"{JOBS}/{job_id}/events", headers=tag)
        assert [each["message"] for each in answer.json()["data"]] == ["second", "first"]

    def test_lists(self, service: Service, job_id: str) -> None:
        http = service.http()
        paths = (JOBS, f"{JOBS}?limit=1", f"{JOBS}/{job_id}/checkpoints")

        def tags() -> list[str]:
            answers = [http.get(path) for path in paths]
            for path, answer in zip(paths, answers, strict=True):
                assert http.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
            return [answer.headers["etag"] for answer in answers]

        seen = [tags()]
        change(service, job_id, status=JobStatus.SUCCEEDED)
        seen.append(tags())
        with service.sessions.begin() as session:
            add_adapter(session, service.tenant, session.query(Job).filter_by(id=job_id).one(), step=5)
        seen.append(tags())
        with service.sessions.begin() as session:
            add_job(session, service.tenant)
        seen.append(tags())
        assert http.delete(f"{JOBS}/{job_id}").status_code == 200
        remaining = [http.get(path).headers["etag"] for path in paths[:2]]
        whole, newest, checkpoints = zip(*seen, strict=True)
        # changed by:     the job, nothing, a new job, the deletion
        assert [a != b for a, b in zip(whole, (*whole[1:], remaining[0]), strict=True)] == [True, False, True, True]
        assert [a != b for a, b in zip(newest, (*newest[1:], remaining[1]), strict=True)] == [True, False, True, True]
        assert [a != b for a, b in pairwise(checkpoints)] == [False, True, False]


class TestStates:
    """GET /v1/fine_tuning/jobs/states"""

    def test_what_changes_of_many(self, service: Service, job_id: str) -> None:
        with service.sessions.begin() as session:
            queued = [add_job(session, service.tenant, status=JobStatus.QUEUED).id for _ in range(2)]
            foreign = add_job(session, service.stranger).id
        ids = [queued[1], foreign, job_id, "ftjob-unknown", "\0", queued[1]]
        answer = service.http().get(f"{JOBS}/states", params={"ids": ",".join(ids)})
        waiting, running = answer.json()["data"]
        assert running == {
            "id": job_id,
            "object": "fine_tuning.job.state",
            "status": "running",
            "progress": {"percent": 12.5, "step": 1, "total_steps": 8, "train_loss": 2.0},
            "queue_position": None,
            "estimated_finish": None,
            "version": 2,
        }
        assert (waiting["id"], waiting["status"], waiting["progress"]) == (queued[1], "queued", None)
        assert waiting["queue_position"] >= 2
        again = service.http().get(
            f"{JOBS}/states", params={"ids": ",".join(ids)}, headers={"If-None-Match": answer.headers["etag"]}
        )
        assert again.status_code == 304

    @pytest.mark.parametrize("ids", ["", ",", ",".join(f"j{n}" for n in range(501))])
    def test_too_few_and_too_many(self, service: Service, ids: str) -> None:
        answer = service.http().get(f"{JOBS}/states", params={"ids": ids})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "ids"

    def test_the_place_in_the_queue(self, service: Service) -> None:
        with service.sessions.begin() as session:
            first, second, third = (add_job(session, service.tenant, status=JobStatus.QUEUED).id for _ in range(3))
        http = service.http()

        def place(job_id: str) -> int | None:
            found: int | None = http.get(f"{JOBS}/{job_id}").json()["queue_position"]
            return found

        start = place(first)
        assert start is not None
        assert (place(second), place(third)) == (start + 1, start + 2)
        listed = {job["id"]: job["queue_position"] for job in http.get(JOBS).json()["data"]}
        assert listed[third] == start + 2
        tag = http.get(f"{JOBS}/{third}").headers["etag"]
        list_tag = http.get(f"{JOBS}?limit=1").headers["etag"]
        assert http.post(f"{JOBS}/{second}/pause").json()["queue_position"] is None
        # Nothing of the third's row changed, and yet it has moved up.
        assert http.get(f"{JOBS}/{third}", headers={"If-None-Match": tag}).json()["queue_position"] == start + 1
        assert http.get(f"{JOBS}?limit=1", headers={"If-None-Match": list_tag}).status_code == 200
        assert http.post(f"{JOBS}/{second}/resume").json()["queue_position"] == start + 1


class TestWaiting:
    """wait="""

    def test_a_job_is_told_once_it_changes(self, service: Service, job_id: str) -> None:
        http = service.http()
        tag = {"If-None-Match": http.get(f"{JOBS}/{job_id}").headers["etag"]}
        with in_background(lambda: http.get(f"{JOBS}/{job_id}?wait={LONG}", headers=tag)) as answer:
            change(service, job_id, status=JobStatus.SUCCEEDED)
            assert answer.result(timeout=10).json()["status"] == "succeeded"
        # What the client does not have is told at once, and so is a job that will not change.
        assert http.get(f"{JOBS}/{job_id}?wait={LONG}", headers=tag).json()["status"] == "succeeded"
        assert http.get(f"{JOBS}/{job_id}?wait={LONG}").json()["status"] == "succeeded"

    def test_without_a_tag_the_next_change_is_told(self, service: Service, job_id: str) -> None:
        http = service.http()
        with statements() as sent, in_background(lambda: http.get(f"{JOBS}/{job_id}?wait={LONG}")) as answer:
            wait_until(lambda: len(sent) >= 2)  # it looks for the second time
            change(service, job_id, progress={"step": 2, "total_steps": 8})
            assert answer.result(timeout=10).json()["progress"]["step"] == 2

    def test_the_time_is_over(self, service: Service, job_id: str) -> None:
        http = service.http()
        first = http.get(f"{JOBS}/{job_id}")
        for path in (f"{JOBS}/{job_id}", f"{JOBS}/{job_id}/events", f"{JOBS}/states?ids={job_id}"):
            tag = {"If-None-Match": http.get(path).headers["etag"]}
            joined = "&" if "?" in path else "?"
            assert http.get(f"{path}{joined}wait=0.3", headers=tag).status_code == 304
        assert http.get(f"{JOBS}/{job_id}?wait=0.3").json() == first.json()
        assert http.get(f"{JOBS}/{job_id}?wait=61").json()["error"]["param"] == "wait"

    def test_events_behind_a_cursor(self, service: Service, job_id: str) -> None:
        http = service.http()
        last = http.get(f"{JOBS}/{job_id}/events").json()["first_id"]
        path = f"{JOBS}/{job_id}/events?order=asc&after={last}&wait={LONG}"
        with in_background(lambda: http.get(path)) as answer:
            change(service, job_id, progress={"step": 2, "total_steps": 8})  # is no event
            new = say(service, job_id, "second")
            found = answer.result(timeout=10).json()
            assert [each["id"] for each in found["data"]] == [new]

    def test_states(self, service: Service, job_id: str) -> None:
        http = service.http()
        path = f"{JOBS}/states?ids={job_id}"
        tag = {"If-None-Match": http.get(path).headers["etag"]}
        with in_background(lambda: http.get(f"{path}&wait={LONG}", headers=tag)) as answer:
            change(service, job_id, status=JobStatus.FAILED)
            assert answer.result(timeout=10).json()["data"][0]["status"] == "failed"

    def test_a_deleted_job_is_told_too(self, service: Service, job_id: str) -> None:
        http = service.http()
        change(service, job_id, status=JobStatus.CANCELLED)
        tag = {"If-None-Match": http.get(f"{JOBS}/{job_id}").headers["etag"]}
        with in_background(lambda: http.get(f"{JOBS}/{job_id}?wait={LONG}", headers=tag)) as answer:
            assert service.http().delete(f"{JOBS}/{job_id}").json() == {
                "id": job_id,
                "object": "fine_tuning.job",
                "deleted": True,
            }
            assert answer.result(timeout=10).status_code == 404

    def test_those_who_wait_hold_nothing(self, service: Service, job_id: str) -> None:
        """More of them than the process has threads (40) and connections (15) leave room for all others."""
        waiting = 60
        limits = httpx.Limits(max_connections=waiting)
        http = service.http(limits=limits)
        tag = {"If-None-Match": http.get(f"{JOBS}/{job_id}").headers["etag"]}
        begun = threading.Semaphore(0)

        def wait() -> int:
            begun.release()
            return http.get(f"{JOBS}/{job_id}?wait={LONG}", headers=tag).status_code

        with ThreadPoolExecutor(waiting) as pool:
            answers = [pool.submit(wait) for _ in range(waiting)]
            for _ in answers:
                assert begun.acquire(timeout=10)
            with statements() as sent:
                for _ in range(20):
                    assert service.http().get(f"{JOBS}?limit=1").status_code == 200
            looks = [each for each in sent if "event_count" in each]
            assert len(looks) < waiting  # together, not each for itself
            change(service, job_id, status=JobStatus.SUCCEEDED)
            assert [answer.result(timeout=15) for answer in answers] == [200] * waiting


class TestStream:
    """Accept: text/event-stream"""

    def lines(self, answer: httpx.Response) -> Iterator[str]:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return (line for line in answer.iter_lines() if line)

    def test_events_as_they_happen_until_the_end(self, service: Service, job_id: str) -> None:
        http = service.http()
        http.headers["accept"] = "text/event-stream"
        with http.stream("GET", f"{JOBS}/{job_id}/events") as answer:
            lines = self.lines(answer)
            assert '"message":"first"' in next(lines)
            first = next(lines).removeprefix("id: ")
            second = say(service, job_id, "second")
            assert '"message":"second"' in next(lines)
            assert next(lines) == f"id: {second}"
            with service.sessions.begin() as session:
                assert move_job(session, job_id, source=JobStatus.RUNNING, target=JobStatus.SUCCEEDED)
                add_event(session, job_id, message="done")
            assert '"message":"done"' in next(lines)
            last = next(lines).removeprefix("id: ")
            assert list(lines) == ["event: end", f'data: {{"id": "{job_id}", "status": "succeeded"}}']
        with http.stream("GET", f"{JOBS}/{job_id}/events", headers={"Last-Event-ID": first}) as answer:
            told = [line.removeprefix("id: ") for line in self.lines(answer) if line.startswith("id: ")]
        assert told == [second, last]
        # What ends the reconnecting of a browser.
        assert http.get(f"{JOBS}/{job_id}/events", headers={"Last-Event-ID": last}).status_code == 204

    def test_a_wrong_cursor_and_a_foreign_job_are_refused(self, service: Service, job_id: str) -> None:
        accept = {"Accept": "text/event-stream", "Last-Event-ID": "ft-event-unknown"}
        assert service.http().get(f"{JOBS}/{job_id}/events", headers=accept).status_code == 400
        assert service.http(service.stranger).get(f"{JOBS}/{job_id}/events", headers=accept).status_code == 404

    def test_heartbeats_and_a_revoked_key(self, service: Service, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "HEARTBEAT_SECONDS", 0.1)
        accept = {"Accept": "text/event-stream"}
        with service.http().stream("GET", f"{JOBS}/{job_id}/events", headers=accept) as answer:
            lines = self.lines(answer)
            assert [next(lines) for _ in range(4)][2:] == [": still here"] * 2
            with service.sessions.begin() as session:
                revoke_api_key(session, service.tenant.key)
            assert set(lines) <= {": still here"}  # it ends

    def test_many_events_come_whole(self, service: Service) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED)
            ids = [add_event(session, job.id, message=str(n)).id for n in range(2 * following.PAGE_EVENTS + 1)]
        accept = {"Accept": "text/event-stream"}
        with service.http().stream("GET", f"{JOBS}/{job.id}/events", headers=accept) as answer:
            assert [line.removeprefix("id: ") for line in self.lines(answer) if line.startswith("id: ")] == ids


class TestCursors:
    """No event is skipped or repeated, however its writers commit."""

    def test_writers_that_would_commit_in_reverse_order(self, service: Service, job_id: str) -> None:
        """The second must not have its number before the first has committed."""
        if service.database.dialect.name == "sqlite":
            pytest.skip("on SQLite one transaction writes at a time")
        http = service.http()
        seen: list[str] = []

        def read() -> None:
            after = f"&after={seen[-1]}" if seen else ""
            page = http.get(f"{JOBS}/{job_id}/events?order=asc{after}").json()
            seen.extend(each["id"] for each in page["data"])

        read()
        with service.sessions() as slow, ThreadPoolExecutor(1) as pool:
            early = add_event(slow, job_id, message="written first, committed last").id
            slow.flush()
            late = pool.submit(say, service, job_id, "written last, to be committed first")
            wait_until(lambda: late.done() or self.somebody_waits(service))
            read()
            slow.commit()
            late_id = late.result(timeout=10)
        read()
        assert seen[1:] == [early, late_id]

    def somebody_waits(self, service: Service) -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with service.database.connect() as connection:
            return bool(connection.execute(text(waiting)).scalar_one())

    def test_writers_and_a_reader_at_once(self, service: Service, job_id: str) -> None:
        """Events by four writers, by different ways of the code, while a reader follows."""
        http = service.http()
        ended = threading.Event()
        written: list[str] = []

        def write(number: int) -> None:
            for turn in range(15):
                with service.sessions.begin() as session:
                    if (number + turn) % 3 == 0:
                        request_cancel(session, job_id)
                    added = [add_event(session, job_id, message=f"{number}.{turn}").id for _ in range(1 + turn % 2)]
                written.extend(added)

        def follow() -> list[str]:
            seen: list[str] = []
            while True:
                last_round = ended.is_set()
                after = f"&after={seen[-1]}" if seen else ""
                page = http.get(f"{JOBS}/{job_id}/events?order=asc&limit=7{after}").json()
                seen.extend(each["id"] for each in page["data"])
                if last_round and not page["has_more"]:
                    return seen

        with ThreadPoolExecutor(5) as pool:
            reader = pool.submit(follow)
            for writer in [pool.submit(write, number) for number in range(4)]:
                writer.result(timeout=60)
            ended.set()
            seen = reader.result(timeout=60)
        assert len(seen) == len(set(seen))
        assert set(seen[1:]) == set(written)


def test_one_bad_id_spoils_no_others(service: Service, job_id: str) -> None:
    http = service.http()
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(http.get, f"{JOBS}/ftjob-%00{n}") for n in range(8)]
        good = [pool.submit(http.get, f"{JOBS}/{job_id}") for _ in range(8)]
    assert {answer.result().status_code for answer in bad} == {404}
    assert {answer.result().status_code for answer in good} == {200}


def test_a_caller_is_believed_for_a_moment_only(service: Service, job_id: str) -> None:
    http = service.http()
    http.get(f"{JOBS}/{job_id}")
    with service.sessions.begin() as session:
        revoke_api_key(session, service.tenant.key)
    started = now()
    wait_until(lambda: http.get(f"{JOBS}/{job_id}").status_code == 401)
    assert (now() - started).total_seconds() < CALLER_SECONDS + 1


def test_bodies_that_are_kept_have_a_bound() -> None:
    bodies = Bodies(max_bytes=10)
    bodies.put("a", "1", b"xxxxx")
    bodies.put("b", "1", b"xxxxx")
    assert bodies.get("a", "1") == b"xxxxx"
    bodies.put("c", "1", b"xxxxx")  # in the place of the one that was used least lately
    assert [bodies.get(job, "1") for job in "abc"] == [b"xxxxx", None, b"xxxxx"]
    bodies.put("c", "2", b"x")
    assert (bodies.get("c", "1"), bodies.get("c", "2"), bodies.get("a", "1")) == (None, b"x", b"xxxxx")
    bodies.put("d", "1", b"x" * 11)
    assert bodies.get("d", "1") is None


def test_an_unknown_job_of_an_event_is_refused(service: Service) -> None:
    """The count of events takes no job's place that is not there."""
    with pytest.raises(Exception, match=r"(?i)foreign key"), service.sessions.begin() as session:
        _unknown(session)


def _unknown(session: Session) -> None:
    add_event(session, new_id("ftjob-"), message="nobody's")
    session.flush()
