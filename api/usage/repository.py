"""Queries of the ledger. It is above all tenants: who may see whose is for the service to say."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Double, cast, delete, func, select, update
from sqlalchemy.orm import Session

from api.database import insert_into, now
from api.files.models import File
from api.jobs.models import Job
from api.models.models import Adapter
from api.uploads.models import Upload, UploadPart
from api.usage.models import Operation, UsageRecord, UsageWriter

MINUTE_SECONDS = 60


@dataclass(frozen=True, order=True)
class UsageKey:
    """What amounts are added up by."""

    project_id: str
    minute: int
    key_id: str
    model: str
    operation: str
    job_id: str = ""


@dataclass
class Amounts:
    """How much was used."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    trained_tokens: int = 0
    items: int = 0
    seconds: float = 0.0


#: Names of the amounts, which are columns too.
AMOUNTS = tuple(field.name for field in fields(Amounts))
_KEY = tuple(field.name for field in fields(UsageKey))
#: Rows of one statement; each has a dozen parameters, of which PostgreSQL takes 65,535.
_ROWS = 500


@dataclass(frozen=True)
class UsageFilter:
    """Whose and which usage. None and empty do not filter."""

    #: None for all.
    project_ids: Collection[str] | None
    key_ids: Collection[str] = ()
    models: Collection[str] = ()
    operations: Collection[str] = ()

    def criteria(self) -> list[ColumnElement[bool]]:
        """As SQL."""
        lists = (
            (UsageRecord.key_id, self.key_ids),
            (UsageRecord.model, self.models),
            (UsageRecord.operation, self.operations),
        )
        found: list[ColumnElement[bool]] = [column.in_(values) for column, values in lists if values]
        if self.project_ids is not None:
            found.append(UsageRecord.project_id.in_(self.project_ids))
        return found


@dataclass(frozen=True)
class Total:
    """What was used in the bucket that begins at ``start``, by one value of each column that was asked for."""

    start: int
    by: Mapping[str, str]
    amounts: Amounts


@dataclass(frozen=True)
class StoredBytes:
    """What a project has stored."""

    files: int
    #: Parts of uploads that are not completed.
    uploads: int
    models: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.files + self.uploads + self.models


def present_minute() -> int:
    """The beginning of the minute that it is, in Unix seconds."""
    seconds = int(time.time())
    return seconds - seconds % MINUTE_SECONDS


def add(session: Session, used: Mapping[UsageKey, Amounts]) -> None:
    """Add to the ledger.

    In the order of the keys: processes that add to the same rows at once then wait for one another, and never in a
    circle.
    """
    rows = [asdict(key) | asdict(amounts) for key, amounts in sorted(used.items())]
    for begin in range(0, len(rows), _ROWS):
        statement = insert_into(session, UsageRecord).values(rows[begin : begin + _ROWS])
        sums = {name: getattr(UsageRecord, name) + statement.excluded[name] for name in AMOUNTS}
        session.execute(statement.on_conflict_do_update(index_elements=_KEY, set_=sums))


def begin_batch(session: Session, writer_id: str, batch: int) -> bool:
    """Note that a writer's batch is added in this transaction; False if it was added before."""
    statement = insert_into(session, UsageWriter).values(id=writer_id, batch=batch, updated_at=now())
    values = {"batch": statement.excluded.batch, "updated_at": statement.excluded.updated_at}
    unless_there = statement.on_conflict_do_update(
        index_elements=["id"], set_=values, where=UsageWriter.batch < statement.excluded.batch
    )
    return session.scalar(unless_there.returning(UsageWriter.seq)) is not None


def forget_writers(session: Session, *, before: datetime) -> None:
    """Forget those that have added nothing since then."""
    session.execute(delete(UsageWriter).where(UsageWriter.updated_at < before))


def add_training(session: Session, job_id: str) -> None:
    """Add what a job has been trained since it was added last."""
    columns = (Job.project_id, Job.key_id, Job.model, Job.run_tokens, Job.run_seconds)
    job = session.execute(select(*columns, Job.counted_tokens, Job.counted_seconds).where(Job.id == job_id)).one()
    tokens, seconds = job.run_tokens - job.counted_tokens, job.run_seconds - job.counted_seconds
    if not tokens and not seconds:
        return
    key = UsageKey(job.project_id, present_minute(), job.key_id or "", job.model, Operation.TRAINING, job_id)
    add(session, {key: Amounts(trained_tokens=tokens, seconds=seconds)})
    counted = {"counted_tokens": job.run_tokens, "counted_seconds": job.run_seconds}
    statement = update(Job).where(Job.id == job_id).values(**counted)
    session.execute(statement.execution_options(synchronize_session=False))


def totals(
    session: Session, wanted: UsageFilter, *, since: int, before: int, width: int, by: Sequence[str]
) -> list[Total]:
    """What was used from ``since`` on until ``before``, in Unix seconds, in buckets of ``width`` seconds and by
    columns of `UsageKey`; in the order of both."""
    start = (UsageRecord.minute - UsageRecord.minute % width).label("start")
    columns = [getattr(UsageRecord, name) for name in by]
    # A sum of BIGINT is a NUMERIC on PostgreSQL, which would arrive as a Decimal.
    sums = [
        cast(func.sum(getattr(UsageRecord, name)), Double if name == "seconds" else BigInteger).label(name)
        for name in AMOUNTS
    ]
    period = (UsageRecord.minute >= since, UsageRecord.minute < before)
    statement = select(start, *columns, *sums).where(*period, *wanted.criteria())
    rows = session.execute(statement.group_by(start, *columns).order_by(start, *columns)).mappings()
    return [_total(row, by) for row in rows]


def _total(row: Mapping[Any, Any], by: Sequence[str]) -> Total:
    return Total(row["start"], {name: row[name] for name in by}, Amounts(**{name: row[name] for name in AMOUNTS}))


def bytes_stored(session: Session, project_id: str) -> StoredBytes:
    """What the project has stored now. The sizes of adapters are read without the adapters."""
    files = select(func.sum(File.bytes)).where(File.project_id == project_id, File.deleted_at.is_(None))
    parts = select(func.sum(UploadPart.bytes)).join(Upload, Upload.id == UploadPart.upload_id)
    models = select(func.sum(func.length(Adapter.artifact))).where(Adapter.project_id == project_id)
    found = (files, parts.where(Upload.project_id == project_id), models)
    return StoredBytes(*(int(session.scalar(each) or 0) for each in found))
