"""What was used: the ledger, in sums per minute."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Sequence


class Operation(StrEnum):
    """What a model was used for."""

    CHAT = "chat"
    COMPLETION = "completion"
    CLASSIFICATION = "classification"
    TRAINING = "training"


class UsageRecord(Base):
    """What one key used of one model in one minute. It outlives whatever it names: keys, models, jobs, projects."""

    __tablename__ = "usage_records"
    __table_args__ = (
        UniqueConstraint("project_id", "minute", "key_id", "model", "operation", "job_id"),
        Index(None, "minute"),
    )

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    project_id: Mapped[str]
    #: Its beginning, in Unix seconds: buckets of any width are sums of them on every database.
    minute: Mapped[int] = mapped_column(BigInteger)
    #: Empty for a job that was made before jobs had keys.
    key_id: Mapped[str]
    #: As the request named it.
    model: Mapped[str]
    operation: Mapped[str]
    #: Empty where it was no job's.
    job_id: Mapped[str]
    requests: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    trained_tokens: Mapped[int] = mapped_column(BigInteger)
    #: Texts, pairs and images that were classified.
    items: Mapped[int] = mapped_column(BigInteger)
    #: Of training.
    seconds: Mapped[float]


class UsageWriter(Base):
    """A process that adds to the ledger, and the last batch of it that is in there.

    It is written with the batch: one whose commit was not answered is not added again.
    """

    __tablename__ = "usage_writers"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    batch: Mapped[int] = mapped_column(BigInteger)
    updated_at: Mapped[datetime]
