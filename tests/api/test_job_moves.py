"""Moves of a job's status: only those of the table, and each for one caller only."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session, sessionmaker

from api.caller import Caller
from api.jobs import service as jobs
from api.jobs.models import MOVES, Job, JobStatus
from api.jobs.repository import move_job, request_cancel
from api.unit_of_work import UnitOfWork
from tests.api.rows import add_job
from tests.api.support import Tenant


@dataclass(frozen=True)
class Rows:
    """A database with one project."""

    sessions: sessionmaker[Session]
    tenant: Tenant

    def add(self, status: JobStatus) -> str:
        with self.sessions.begin() as session:
            return add_job(session, self.tenant, status=status).id

    def status(self, job_id: str) -> str:
        with self.sessions() as session:
            return session.query(Job).filter_by(id=job_id).one().status


@pytest.fixture
def rows(sessions: sessionmaker[Session], tenant: Tenant) -> Rows:
    return Rows(sessions=sessions, tenant=tenant)


def test_every_pair_of_states_moves_as_the_table_says(rows: Rows) -> None:
    for source, target in itertools.product(JobStatus, JobStatus):
        job_id = rows.add(source)
        with rows.sessions.begin() as session:
            if target in MOVES[source]:
                assert move_job(session, job_id, source=source, target=target)
            else:
                with pytest.raises(ValueError, match="no job moves from"):
                    move_job(session, job_id, source=source, target=target)
        assert rows.status(job_id) == (target if target in MOVES[source] else source)


def test_a_move_from_a_status_that_has_passed_changes_nothing(rows: Rows) -> None:
    job_id = rows.add(JobStatus.CANCELLED)
    with rows.sessions.begin() as session:
        assert not move_job(session, job_id, source=JobStatus.QUEUED, target=JobStatus.RUNNING, attempt=9)
        assert not request_cancel(session, job_id)
    assert rows.status(job_id) == JobStatus.CANCELLED


def test_of_many_that_move_a_job_one_succeeds(rows: Rows) -> None:
    job_id = rows.add(JobStatus.QUEUED)
    outcomes: list[bool] = []
    barrier = threading.Barrier(6)

    def move() -> None:
        barrier.wait()
        with rows.sessions.begin() as session:
            outcomes.append(move_job(session, job_id, source=JobStatus.QUEUED, target=JobStatus.RUNNING))

    threads = [threading.Thread(target=move) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]


def test_a_cancellation_meets_a_job_that_has_just_started(rows: Rows, database: Engine) -> None:
    """The trainer's claim comes between the read and the write of the cancellation."""
    if database.dialect.name == "sqlite":
        pytest.skip("on SQLite the cancellation's transaction keeps every other writer out")
    job_id = rows.add(JobStatus.QUEUED)
    caller = Caller(project_id=rows.tenant.project_id, project_slug=rows.tenant.slug, key_id="key_x")
    statements: list[object] = []
    with rows.sessions() as session:

        @event.listens_for(session, "do_orm_execute")
        def _claim_before_the_second_statement(state: object) -> None:
            statements.append(state)
            if len(statements) == 2:
                with rows.sessions.begin() as trainer:
                    assert move_job(trainer, job_id, source=JobStatus.QUEUED, target=JobStatus.RUNNING)

        job = jobs.cancel(UnitOfWork(session), caller, job_id)
        session.commit()
    assert (job.status, job.cancel_requested) == (JobStatus.RUNNING, True)
