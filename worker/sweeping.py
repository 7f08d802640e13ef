"""Looks after what nobody looks after: lost messages, vanished trainers and engines, cancels that nobody saw."""

from __future__ import annotations

import logging
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, false, or_, select
from sqlalchemy.orm import Session

from api.database import database_now
from api.engines import repository
from api.idempotency import repository as answers
from api.jobs.models import Job, JobStatus
from api.queue import TaskName
from api.quotas.repository import may_run
from api.reports.repository import list_waiting
from api.usage import repository as usage
from api.webhooks import repository as webhooks
from worker import failures, metrics
from worker.context import Resources
from worker.results import mark_cancelled, mark_failed, mark_paused
from worker.tidying import remove_expired

logger = logging.getLogger(__name__)

#: Messages of one sweep and task; what waits beyond them is rung for when these are taken.
MAX_RINGS = 100
#: How long a dead engine's row is kept, in ``engine_ttl``, for those who look for what happened.
KEPT_TTLS = 12
#: How long users can read what came of a delivery.
DELIVERIES_KEPT = timedelta(days=30)
#: A process that tries to write a batch again does so every second.
WRITERS_KEPT = timedelta(days=7)


def sweep(held: Resources) -> None:
    """End or pause the jobs that no trainer will, ring for what waits, forget dead engines, old deliveries, old
    answers, writers of usage and what has expired."""
    _end_abandoned(held)
    _ring_again(held)
    _forget_engines(held)
    _forget_deliveries(held)
    _forget_answers(held)
    _forget_writers(held)
    remove_expired(held)


def _end_abandoned(held: Resources) -> None:
    with held.sessions.begin() as session:
        out_of_attempts = Job.lost_trainers + 1 >= held.settings.max_attempts
        statement = (
            select(Job)
            .where(_lost(session), or_(Job.cancel_requested, Job.pause_requested, out_of_attempts))
            .with_for_update(skip_locked=True)  # its trainer renews it this moment: not lost after all
        )
        for job in session.scalars(statement):
            logger.warning("job %s: its trainer %s vanished", job.id, job.lease_owner)
            job.lost_trainers += 1
            if job.cancel_requested:
                mark_cancelled(session, job)
            elif job.pause_requested:
                mark_paused(session, job)
            else:
                mark_failed(session, job, failures.TRAINER_LOST)


def _ring_again(held: Resources) -> None:
    with held.sessions() as session:
        due = {
            TaskName.VALIDATE: _ids(session, _stale_validation(held, session)),
            TaskName.REPORT: list_waiting(session, age=held.settings.sweep_interval, limit=MAX_RINGS),
            TaskName.TRAIN: _ids(
                session,
                and_(
                    or_(
                        Job.status == JobStatus.QUEUED,
                        and_(_lost(session), Job.cancel_requested == false(), Job.pause_requested == false()),
                    ),
                    may_run(default_running=held.settings.quota_jobs_running),  # the others would be in the way
                ),
            ),
            TaskName.DELIVER: webhooks.due(session, limit=MAX_RINGS),
        }
    # Messages that wait are as good as new ones; without this look, a day with busy trainers would pile up one more of
    # them for each row and sweep. Before the first is sent: some tasks share a queue.
    idle = [task for task, ids in due.items() if ids and held.queue.waiting(task) == 0]
    for task in idle:
        for row_id in due[task]:
            held.queue.send(task, row_id)
        metrics.RINGS.labels(task.value).inc(len(due[task]))


def _forget_engines(held: Resources) -> None:
    with held.sessions.begin() as session:
        for url in repository.remove_silent(session, silence=KEPT_TTLS * held.settings.engine_ttl):
            logger.warning("engine %s: it gave no heartbeat and is forgotten", url)


def _forget_deliveries(held: Resources) -> None:
    with held.sessions.begin() as session:
        webhooks.forget(session, before=database_now(session) - DELIVERIES_KEPT)


def _forget_answers(held: Resources) -> None:
    with held.sessions.begin() as session:
        answers.remove_older(session, database_now(session) - answers.KEPT)


def _forget_writers(held: Resources) -> None:
    with held.sessions.begin() as session:
        usage.forget_writers(session, before=database_now(session) - WRITERS_KEPT)


def _stale_validation(held: Resources, session: Session) -> ColumnElement[bool]:
    before = database_now(session) - held.settings.sweep_interval
    return and_(Job.status == JobStatus.VALIDATING_FILES, Job.created_at < before)


def _lost(session: Session) -> ColumnElement[bool]:
    return and_(Job.status == JobStatus.RUNNING, Job.lease_until < database_now(session))


def _ids(session: Session, criterion: ColumnElement[bool]) -> list[str]:
    return list(session.scalars(select(Job.id).where(criterion).order_by(Job.seq).limit(MAX_RINGS)))
