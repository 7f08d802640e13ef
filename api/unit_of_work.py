"""One request or task, one transaction; what must follow it or undo it is collected beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.orm import Session, sessionmaker

from api.queue import TaskName, TaskQueue

log = structlog.get_logger(__name__)


class UnitOfWork:
    """A session, the messages to send once it is committed, and what to do in either case.

    Services call ``session.flush()`` for ids and never commit.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._messages: list[tuple[TaskName, str]] = []
        self._on_commit: list[Callable[[], None]] = []
        self._on_rollback: list[Callable[[], None]] = []

    def ring(self, task: TaskName, job_id: str) -> None:
        """Send a message after the commit; never if there is none."""
        self._messages.append((task, job_id))

    def on_commit(self, action: Callable[[], None]) -> None:
        """Do what cannot be undone, such as removing an object, only once the rows say so."""
        self._on_commit.append(action)

    def on_rollback(self, action: Callable[[], None]) -> None:
        """Undo what lies outside the database, such as a stored object."""
        self._on_rollback.append(action)

    def settle(self, queue: TaskQueue) -> None:
        """After the commit: act and send. Nothing here may fail the request, whose rows are already true."""
        for action in self._on_commit:
            _attempt(action, event="action_after_commit_failed")
        for task, job_id in self._messages:
            try:
                queue.send(task, job_id)
            except Exception:
                # The row is the truth: the sweeper rings again for it.
                log.exception("message_not_sent", task=task.value, job_id=job_id)

    def undo(self) -> None:
        """After the rollback: take back, newest first."""
        for action in reversed(self._on_rollback):
            _attempt(action, event="action_after_rollback_failed")


@contextmanager
def open_unit_of_work(sessions: sessionmaker[Session], queue: TaskQueue) -> Iterator[UnitOfWork]:
    """Commit at the end of the block and then send; roll back, undo and send nothing when it raises."""
    with sessions() as session:
        work = UnitOfWork(session)
        try:
            yield work
            session.commit()
        except BaseException:
            session.rollback()
            work.undo()
            raise
    work.settle(queue)


def _attempt(action: Callable[[], None], *, event: str) -> None:
    try:
        action()
    except Exception:
        log.exception(event)
