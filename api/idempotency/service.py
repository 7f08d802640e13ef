"""Carrying a request out once: claim it, in the transaction of what it makes, and keep its answer.

The claim is the transaction's first statement, on a row that all attempts of a request share. So another attempt waits
until the first one has committed, and then has its answer, or has rolled back, and then takes its place.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api.database import now
from api.errors import AnswerNotKept, ApiError, IdempotencyKeyReused, RequestInProgress
from api.idempotency import repository
from api.idempotency.attempt import Attempt
from api.idempotency.models import IdempotencyRecord
from api.unit_of_work import UnitOfWork

#: How long a repetition waits for the attempt before.
MAX_WAIT_MILLISECONDS = 10_000


class Replayed(Exception):
    """Stops a request that was carried out before; its answer was this."""

    def __init__(self, *, status: int, body: str) -> None:
        super().__init__("carried out before")
        self.status = status
        self.body = body


def claim(work: UnitOfWork, *, attempt: Attempt, sessions: sessionmaker[Session]) -> None:
    """Let this attempt be the one that carries the request out.

    Args:
        work: just begun.
        attempt: what the request is.
        sessions: for what has to be forgotten if the attempt fails.

    Raises:
        Replayed: an attempt before did.
        IdempotencyKeyReused: another request had the key.
        AnswerNotKept: an attempt before did, and its answer had a secret.
        RequestInProgress: an attempt before has not ended for long.
    """
    try:
        found = _claim_or_find(work.session, attempt)
    except OperationalError as error:
        if attempt.may_be_a_repetition and _waited_in_vain(error):
            raise RequestInProgress("The same request is still being carried out; ask again later.") from error
        raise
    if found is None:
        return
    if attempt.may_be_a_repetition and now() - found.created_at <= attempt.max_age:
        raise _answer_of(found, attempt)
    # What is there belongs to a request that is over. If this one fails, its retry must not find that answer.
    work.on_rollback(partial(_forget, sessions, attempt.digest, made_at=found.created_at))
    repository.change(
        work.session,
        attempt.digest,
        fingerprint=attempt.fingerprint,
        created_at=now(),
        status=None,
        body=None,
        object_id=None,
    )


def keep(work: UnitOfWork, attempt: Attempt, *, status: int, body: str, object_id: str | None) -> None:
    """Keep the answer of the attempt that is about to commit."""
    if work.hint_for_withheld is None:
        repository.change(work.session, attempt.digest, status=status, body=body, object_id=object_id)
    else:
        hint = work.hint_for_withheld
        repository.change(work.session, attempt.digest, status=None, body=hint, object_id=object_id)


def _claim_or_find(session: Session, attempt: Attempt) -> IdempotencyRecord | None:
    if attempt.may_be_a_repetition:
        repository.limit_waiting(session, milliseconds=MAX_WAIT_MILLISECONDS)
    while not repository.insert(session, digest=attempt.digest, fingerprint=attempt.fingerprint, at=now()):
        found = repository.lock(session, attempt.digest)
        if found is not None:  # else it was forgotten in between
            return found
    return None


def _waited_in_vain(error: OperationalError) -> bool:
    """Whether another transaction held what was waited for: PostgreSQL's row, or all of SQLite."""
    found = getattr(error.orig, "sqlstate", None), getattr(error.orig, "sqlite_errorname", None)
    return found[0] == "55P03" or found[1] == "SQLITE_BUSY"


def _forget(sessions: sessionmaker[Session], digest: str, *, made_at: datetime) -> None:
    with sessions.begin() as session:
        repository.remove(session, digest, made_at=made_at)


def _answer_of(found: IdempotencyRecord, attempt: Attempt) -> Replayed | ApiError:
    if found.fingerprint != attempt.fingerprint:
        return IdempotencyKeyReused(
            "Another request had this Idempotency-Key; a key stands for one request, so take a new one.",
            param="Idempotency-Key",
        )
    if found.status is None:
        return AnswerNotKept(
            f"This request was carried out before, on {found.object_id}; its answer had a secret, which is shown "
            f"once. {found.body or ''}".rstrip()
        )
    return Replayed(status=found.status, body=found.body or "")
