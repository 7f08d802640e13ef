"""One request or task, one transaction; what must follow it or undo it is collected beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from sqlalchemy.orm import Session, sessionmaker

from api.queue import TaskName, TaskQueue

log = structlog.get_logger(__name__)


class UnitOfWork:
    """A session, the messages to send once it is committed, and what to do in either case.

    Services call ``session.flush()`` for ids and never commit.

    Args:
        session: of the transaction.
        on_begin: called before anybody else has the session; what it raises, the first use of the session raises.

    Attributes:
        details: what the audit log says of the change beside its object; see `describe`.
        project_id: the project that the change is about, where it is another than the caller's.
        hint_for_withheld: what to do instead of asking for the answer again; see `withhold_answer`.
    """

    def __init__(self, session: Session, *, on_begin: Callable[[UnitOfWork], None] | None = None) -> None:
        self._session = session
        self._on_begin = on_begin
        self.details: dict[str, Any] = {}
        self.project_id: str | None = None
        self.hint_for_withheld: str | None = None
        self._messages: list[tuple[TaskName, str]] = []
        self._on_commit: list[Callable[[], None]] = []
        self._on_rollback: list[Callable[[], None]] = []

    @property
    def session(self) -> Session:
        """The session. Work that needs none, such as storing a file, is best done before: the first use may lock."""
        if self._on_begin is not None:
            begin, self._on_begin = self._on_begin, None
            begin(self)
        return self._session

    @property
    def has_begun(self) -> bool:
        """Whether anybody used the session."""
        return self._on_begin is None

    def describe(self, *, project_id: str | None = None, **details: Any) -> None:
        """Tell the audit log more of the change than its action and its object. No secrets."""
        self.project_id = project_id
        self.details.update(details)

    def withhold_answer(self, hint: str) -> None:
        """The answer has a secret and must not be kept; ``hint`` is for those who ask for it again."""
        self.hint_for_withheld = hint

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
def open_unit_of_work(
    sessions: sessionmaker[Session], queue: TaskQueue, *, on_begin: Callable[[UnitOfWork], None] | None = None
) -> Iterator[UnitOfWork]:
    """Commit at the end of the block and then send; roll back, undo and send nothing when it raises."""
    with sessions() as session:
        work = UnitOfWork(session, on_begin=on_begin)
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
