"""Answers that are kept for requests that come again."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Text
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base, Sequence


class IdempotencyRecord(Base):
    """A request that was carried out, in the transaction of what it made, and its answer."""

    __tablename__ = "idempotency_records"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    created_at: Mapped[datetime] = mapped_column(index=True)
    #: What makes two requests the same one; see ``api.idempotency.attempt``.
    digest: Mapped[str] = mapped_column(unique=True)
    #: Of the body.
    fingerprint: Mapped[str]
    status: Mapped[int | None]
    #: None where the answer has a secret.
    body: Mapped[str | None] = mapped_column(Text)
    object_id: Mapped[str | None]
