"""What the worker's tests share: a small service on a real database, without HTTP."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.database import Base, make_engine, make_sessions, new_id
from api.files.models import File
from api.jobs.models import Checkpoint, Job, JobEvent, JobStatus
from api.models.models import Adapter
from api.projects.models import Project
from api.queue import TaskName
from api.settings import Settings
from api.storage import LocalStore
from uora.spec import HyperparameterRequest, TrainingOptions, UoraSpec, resolve
from worker.context import Resources
from worker.lease import Lease, claim
from worker.spare import SpareChild

BASE_MODEL = "tiny"
TTL = timedelta(seconds=30)


class RecordingQueue:
    """A queue that remembers what was sent; ``waiting`` is what nobody took."""

    def __init__(self) -> None:
        self.sent: list[tuple[TaskName, str]] = []

    def send(self, task: TaskName, job_id: str) -> None:
        self.sent.append((task, job_id))

    def waiting(self, task: TaskName) -> int:
        return sum(sent is task for sent, _ in self.sent)

    def take(self) -> list[tuple[TaskName, str]]:
        taken, self.sent = self.sent, []
        return taken


@dataclass
class Service:
    """Database, files and settings of one test."""

    settings: Settings
    queue: RecordingQueue = field(default_factory=RecordingQueue)

    def __post_init__(self) -> None:
        engine = make_engine(self.settings.database_url)
        Base.metadata.create_all(engine)
        self.engine = engine
        self.sessions = make_sessions(engine)
        self.storage = LocalStore(self.settings.storage_dir)
        with self.sessions.begin() as session:
            self.project = Project(id=new_id("proj_"), name="Acme", slug="acme")
            session.add(self.project)

    def close(self) -> None:
        Base.metadata.drop_all(self.engine)
        self.engine.dispose()

    def resources(self, **changes: Any) -> Resources:
        """The resources of one worker process."""
        settings = self.settings.model_copy(update=changes)
        stopping = threading.Event()
        return Resources(
            settings=settings,
            sessions=self.sessions,
            queue=self.queue,
            storage=self.storage,
            owner=new_id("worker-"),
            stopping=stopping,
            spare=SpareChild(stopping),
        )

    def add_file(self, content: bytes, *, project_id: str | None = None) -> str:
        key = new_id("file-")
        stored = self.storage.write(key, io.BytesIO(content), max_bytes=10**9)
        with self.sessions.begin() as session:
            session.add(
                File(
                    id=key,
                    project_id=project_id or self.project.id,
                    filename="rows.jsonl",
                    purpose="fine-tune",
                    bytes=stored.bytes,
                    sha256=stored.sha256,
                    storage_key=key,
                )
            )
        return key

    def add_job(
        self,
        *,
        status: JobStatus = JobStatus.QUEUED,
        rows: int = 8,
        n_epochs: int = 1,
        training: bytes | None = None,
        validation: bytes | None = None,
        training_options: TrainingOptions | None = None,
        **values: Any,
    ) -> str:
        """A job over ``rows`` small rows, validated unless its status says otherwise."""
        request = HyperparameterRequest(n_epochs=n_epochs, batch_size=2)
        adapter = UoraSpec(r=4)
        options = training_options or TrainingOptions()
        spec = resolve(request, adapter=adapter, learning_rate=0.01, seed=1, n_examples=rows, options=options)
        job = Job(
            id=new_id("ftjob-"),
            project_id=self.project.id,
            status=status,
            model=BASE_MODEL,
            base_model=BASE_MODEL,
            training_file=self.add_file(chat_rows(rows) if training is None else training),
            validation_file=None if validation is None else self.add_file(validation),
            suffix="greeter",
            seed=1,
            hyperparameters=request.model_dump(mode="json"),
            adapter=adapter.model_dump(mode="json"),
            learning_rate=0.01,
            options=options.model_dump(mode="json"),
            training_spec=None if status is JobStatus.VALIDATING_FILES else spec.model_dump(mode="json"),
        )
        for name, value in values.items():
            setattr(job, name, value)
        with self.sessions.begin() as session:
            session.add(job)
        return job.id

    def claim(self, job_id: str, *, owner: str = "one", ttl: timedelta = TTL) -> Lease:
        lease = claim(self.sessions, job_id, owner=owner, ttl=ttl)
        assert lease is not None
        return lease

    def job(self, job_id: str) -> Job:
        with self.sessions() as session:
            return session.execute(select(Job).where(Job.id == job_id)).scalar_one()

    def update(self, job_id: str, **values: Any) -> None:
        with self.sessions.begin() as session:
            job = session.execute(select(Job).where(Job.id == job_id)).scalar_one()
            for name, value in values.items():
                setattr(job, name, value)

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.events(job_id, "message")]

    def events(self, job_id: str, type_: str) -> list[JobEvent]:
        with self.sessions() as session:
            of_job = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == type_)
            return list(session.scalars(of_job.order_by(JobEvent.seq)))

    def adapters(self) -> list[Adapter]:
        with self.sessions() as session:
            return list(session.scalars(select(Adapter).order_by(Adapter.seq)))

    def checkpoints(self) -> list[Checkpoint]:
        with self.sessions() as session:
            return list(session.scalars(select(Checkpoint).order_by(Checkpoint.seq)))


def chat_rows(count: int) -> bytes:
    """JSON lines to train on."""
    rows = (
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"hi {i}"}]}
        for i in range(count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def add_adapter(session: Session, lease: Lease, name: str, *, checkpoint_step: int | None = None) -> None:
    """A row as a trainer might write it."""
    session.add(
        Adapter(
            id=name,
            project_id=lease.project_id,
            job_id=lease.job_id,
            base_model=BASE_MODEL,
            checkpoint_step=checkpoint_step,
            digest="0" * 64,
            manifest={},
            artifact=b"vectors",
        )
    )


def wait_until(condition: Callable[[], object], *, what: str, seconds: float = 30) -> None:
    """Poll until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def tail(file: Path) -> str:
    """The end of a log, for messages of failed tests."""
    return file.read_text(errors="replace")[-4000:] if file.exists() else "no log"
