"""One transaction a request, committed before the answer; messages and deletions only after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session, sessionmaker

from api.projects.models import Project
from api.queue import TaskName
from api.unit_of_work import open_unit_of_work
from tests.api.rows import add_file
from tests.api.support import RecordingQueue, Service

ROWS = b'{"messages": []}\n'


@contextmanager
def failing_commits() -> Iterator[None]:
    """Let every COMMIT of this process fail."""

    def fail(_connection: object) -> None:
        raise OSError("the disk is full")

    event.listen(Engine, "commit", fail)
    try:
        yield
    finally:
        event.remove(Engine, "commit", fail)


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    """A client whose key was used before, so that no request notes that."""
    client = service.client()
    client.models.list()
    return client


def test_a_job_whose_commit_fails_is_a_500_without_a_message(service: Service, client: openai.OpenAI) -> None:
    file = client.files.create(file=ROWS, purpose="fine-tune")
    with failing_commits(), pytest.raises(openai.InternalServerError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert caught.value.status_code == 500
    assert caught.value.request_id is not None
    assert service.queue.messages == []
    assert list(client.fine_tuning.jobs.list()) == []
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert service.queue.messages == [(TaskName.VALIDATE, job.id)]


def test_an_upload_whose_commit_fails_leaves_no_bytes(service: Service, client: openai.OpenAI) -> None:
    with failing_commits(), pytest.raises(openai.InternalServerError):
        client.files.create(file=ROWS, purpose="fine-tune")
    assert service.stored_files() == []
    assert list(client.files.list()) == []


def test_a_deletion_whose_commit_fails_keeps_the_bytes(service: Service, client: openai.OpenAI) -> None:
    file = client.files.create(file=ROWS, purpose="fine-tune")
    with failing_commits(), pytest.raises(openai.InternalServerError):
        client.files.delete(file.id)
    assert client.files.content(file.id).read() == ROWS


def test_a_broker_that_is_down_does_not_fail_the_request(service: Service, client: openai.OpenAI) -> None:
    file = client.files.create(file=ROWS, purpose="fine-tune")
    service.queue.broken = True
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
    assert service.queue.messages == []


def test_a_refused_request_sends_nothing(service: Service) -> None:
    with service.sessions.begin() as session:
        empty = add_file(session, service.tenant, bytes=0).id
    with pytest.raises(openai.BadRequestError):
        service.client().fine_tuning.jobs.create(model="tiny", training_file=empty)
    assert service.queue.messages == []


def test_order_and_undoing(sessions: sessionmaker[Session], service: Service) -> None:
    done: list[str] = []

    class Watching(RecordingQueue):
        def send(self, task: TaskName, job_id: str) -> None:
            with sessions() as other:  # what the message speaks of is there for everyone
                assert other.query(Project).filter_by(name=job_id).count() == 1
            done.append("sent")

    def fail() -> None:
        raise OSError("cannot")

    name = f"order {service.tenant.slug}"
    with open_unit_of_work(sessions, Watching()) as work:
        work.on_rollback(lambda: done.append("undone"))
        work.on_commit(fail)
        work.on_commit(lambda: done.append("acted"))
        work.ring(TaskName.VALIDATE, name)
        work.session.add(Project(id=name, name=name, slug=name))
    assert done == ["acted", "sent"]

    done.clear()
    with pytest.raises(KeyError), open_unit_of_work(sessions, Watching()) as work:  # noqa: PT012
        work.on_rollback(lambda: done.append("first"))
        work.on_rollback(fail)
        work.on_rollback(lambda: done.append("last"))
        work.on_commit(lambda: done.append("acted"))
        work.ring(TaskName.VALIDATE, name)
        raise KeyError
    assert done == ["last", "first"]
