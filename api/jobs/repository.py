"""Queries of jobs: those of a project, and the row-level moves that the worker shares."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Select, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, load_only

from api.database import new_id, now
from api.errors import CheckpointNotFound, JobNotFound
from api.jobs.models import ENDED, MOVES, Checkpoint, Job, JobEvent, JobStatus, TrainingState
from api.pagination import Page, PageQuery, page_key, paginate
from api.repository import Repository
from api.usage import repository as usage
from api.webhooks import repository as webhooks


class JobRepository(Repository[Job]):
    """Jobs of one project, with their events and checkpoints."""

    model = Job
    missing = JobNotFound
    noun = "fine-tuning job"

    def find_unfinished_using(self, file_id: str) -> Job | None:
        """A job that has not ended and reads the file."""
        uses = or_(Job.training_file == file_id, Job.validation_file == file_id)
        statement = self.visible().where(uses, Job.status.not_in(list(ENDED)))
        return self.session.scalar(statement.limit(1))

    def find_all(self, job_ids: Collection[str]) -> dict[str, Job]:
        """Those of the jobs that there are, by their ids."""
        return {job.id: job for job in self.session.scalars(self.visible().where(Job.id.in_(job_ids)))}

    def find_states(self, job_ids: Collection[str]) -> dict[str, Job]:
        """As `find_all`, with those columns alone that tell how far they are."""
        shown = load_only(Job.id, Job.status, Job.progress, Job.estimated_finish, Job.version, raiseload=True)
        jobs = self.session.scalars(self.visible().options(shown).where(Job.id.in_(job_ids)))
        return {job.id: job for job in jobs}

    def lock(self, job_id: str) -> Job:
        """The job, locked until the transaction ends; raises ``JobNotFound``."""
        self.session.execute(self.visible().with_only_columns(Job.seq).where(Job.id == job_id).with_for_update())
        return self.get(job_id)

    def delete(self, job: Job) -> None:
        """Delete the job with its events, checkpoints and state; its models stay, and name no job any more."""
        self.session.execute(delete(Job).where(Job.id == job.id))

    def list_key(self, query: PageQuery, *criteria: ColumnElement[bool]) -> object:
        """What changes whenever something is to be seen on a page of the jobs."""
        rows = self.page_key((Job.seq, Job.version, Job.status), query, *criteria)
        return rows, places(self.session, [seq for seq, _, status in rows if status == JobStatus.QUEUED])

    def places(self, jobs: Iterable[Job]) -> dict[int, int]:
        """Places in the queue of those jobs that wait in it, by ``seq``."""
        return places(self.session, [job.seq for job in jobs if job.status == JobStatus.QUEUED])

    def checkpoints_key(self, job: Job, query: PageQuery) -> object:
        """What changes whenever something is to be seen on a page of the job's checkpoints."""
        return page_key(self.session, self._of(Checkpoint, job.id), Checkpoint.seq, model=Checkpoint, query=query)

    def final_checkpoints(self, jobs: Collection[Job]) -> dict[str, Checkpoint]:
        """The last checkpoint of each job that has one."""
        of_jobs = select(Checkpoint).where(Checkpoint.job_id.in_([job.id for job in jobs]))
        return {found.job_id: found for found in self.session.scalars(of_jobs.order_by(Checkpoint.step_number))}

    def events(self, job_id: str, query: PageQuery) -> Page[JobEvent]:
        """A page of the job's events; none of a job that is not there."""
        return paginate(self.session, self._of(JobEvent, job_id), model=JobEvent, query=query)

    def checkpoints(self, job: Job, query: PageQuery) -> Page[Checkpoint]:
        """A page of the job's checkpoints."""
        return paginate(self.session, self._of(Checkpoint, job.id), model=Checkpoint, query=query)

    def checkpoint(self, job: Job, checkpoint_id: str) -> Checkpoint:
        """One of the job's checkpoints; raises ``CheckpointNotFound``."""
        found: Checkpoint | None = self.session.scalar(
            self._of(Checkpoint, job.id).where(Checkpoint.id == checkpoint_id)
        )
        if found is None:
            raise CheckpointNotFound(f"The job {job.id} has no checkpoint {checkpoint_id!r}.")
        return found

    def best_checkpoint(self, job: Job) -> Checkpoint | None:
        """The job's checkpoint of the lowest validation loss, the earliest of equals; None if none has one."""
        return best_checkpoint(self.session, job.id)

    def has_label(self, key: str, value: str) -> ColumnElement[bool]:
        """Criterion: the job's metadata has this pair."""
        postgresql = self.session.get_bind().dialect.name == "postgresql"
        pairs = (func.jsonb_each_text if postgresql else func.json_each)(Job.labels).table_valued("key", "value")
        return exists(select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value))

    def has_labels(self, labels: dict[str, str] | None) -> list[ColumnElement[bool]]:
        """Criteria: the job's metadata has all of these; None asks for a job without any."""
        if labels is None:
            return [self.has_no_labels()]
        return [self.has_label(key, value) for key, value in labels.items()]

    def has_no_labels(self) -> ColumnElement[bool]:
        """Criterion: the job has no metadata at all."""
        return Job.labels.is_(None)

    def _of(self, model: type[Any], job_id: str) -> Select[Any]:
        return (
            select(model)
            .join(Job, Job.id == model.job_id)
            .where(Job.project_id == self.project_id, model.job_id == job_id)
        )


@dataclass(frozen=True)
class JobVersion:
    """What of a job tells its watchers whether it changed."""

    project_id: str
    id: str
    seq: int
    status: str
    version: int
    event_count: int
    #: In the queue; None for a job that does not wait in it.
    place: int | None = None


def find_versions(session: Session, job_ids: Collection[str]) -> dict[tuple[str, str], JobVersion]:
    """Versions of jobs of any projects, by project and id: those of a caller's are found with his project."""
    columns = (Job.project_id, Job.id, Job.seq, Job.status, Job.version, Job.event_count)
    found = [JobVersion(*row) for row in session.execute(select(*columns).where(Job.id.in_(job_ids)))]
    waiting = places(session, [job.seq for job in found if job.status == JobStatus.QUEUED])
    return {(job.project_id, job.id): replace(job, place=waiting.get(job.seq)) for job in found}


def places(session: Session, seqs: Collection[int]) -> dict[int, int]:
    """How many queued jobs, itself included, are before each of these that is queued too, by ``seq``.

    The oldest job is the first, as for the sweeper that rings for them.
    """
    if not seqs:
        return {}
    place = func.row_number().over(order_by=Job.seq).label("place")
    queue = select(Job.seq, place).where(Job.status == JobStatus.QUEUED, Job.seq <= max(seqs)).subquery()
    return {row.seq: row.place for row in session.execute(select(queue).where(queue.c.seq.in_(seqs)))}


def move_job(session: Session, job_id: str, *, source: JobStatus, target: JobStatus, **values: Any) -> bool:
    """Move a job, only if it still has the status ``source``, and set ``values`` with it.

    Nothing else ends a job: who is to be told of an end, and what it has used, is written here, with it.

    Returns:
        False if the row had another status, or is gone; then nothing was changed.

    Raises:
        ValueError: ``MOVES`` has no such move.
    """
    if target not in MOVES[source]:
        raise ValueError(f"no job moves from {source} to {target}; the moves from there are {MOVES[source]}")
    statement = update(Job).where(Job.id == job_id, Job.status == source).values(status=target, **values)
    if not _changed_one(session, statement):
        return False
    if target in ENDED:
        webhooks.record_end(session, job_id, target)
        usage.add_training(session, job_id)
    return True


def best_checkpoint(session: Session, job_id: str) -> Checkpoint | None:
    """The job's checkpoint of the lowest validation loss, the earliest of equals; None if none has one."""
    of_job = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step_number)
    measured = [found for found in session.scalars(of_job) if found.metrics.get("valid_loss") is not None]
    return min(measured, key=lambda found: float(found.metrics["valid_loss"]), default=None)


def state_step(session: Session, job_id: str) -> int | None:
    """The step after which the job would go on; None if no state of it is kept."""
    return session.scalar(select(TrainingState.step).where(TrainingState.job_id == job_id))


def drop_state(session: Session, job_id: str) -> None:
    """Forget the state of a job that will not go on."""
    session.execute(delete(TrainingState).where(TrainingState.job_id == job_id))


def request_pause(session: Session, job_id: str, *, status: JobStatus) -> bool:
    """Ask whoever validates or trains the job to stop; False if it has another status, or is to be cancelled."""
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.status == status, Job.cancel_requested.is_(False))
        .values(pause_requested=True)
    )
    return _changed_one(session, statement)


def withdraw_pause(session: Session, job_id: str, *, status: JobStatus) -> bool:
    """Take back a pause that has not happened yet; False if there is none to take back."""
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.status == status, Job.pause_requested.is_(True))
        .values(pause_requested=False)
    )
    return _changed_one(session, statement)


def request_cancel(session: Session, job_id: str) -> bool:
    """Ask the trainer of a running job to stop; False if it is not running or was asked before."""
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.RUNNING, Job.cancel_requested.is_(False))
        .values(cancel_requested=True)
    )
    return _changed_one(session, statement)


def add_event(
    session: Session,
    job_id: str,
    *,
    message: str,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
) -> JobEvent:
    """Append to the job's log. ``type`` is ``message`` or ``metrics``, ``level`` info, warn or error."""
    event = JobEvent(
        id=new_id("ft-event-"),
        job_id=job_id,
        level=level,
        type=type,
        message=message,
        data=data,
        created_at=now(),
    )
    session.add(event)
    return event


def _changed_one(session: Session, statement: Any) -> bool:
    # Rows in the session are read again where they are needed, so none has to be matched here.
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast(CursorResult[Any], result).rowcount == 1
