"""An engine tells the api, through the database, where it is and how busy: a row that it renews while it lives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import httpx
import structlog
from sqlalchemy.orm import Session, sessionmaker

from api.database import new_id
from api.engines import repository
from api.engines.models import Load

log = structlog.get_logger()

#: For the engine's question to itself whether its address is right.
CHECK_TIMEOUT_SECONDS = 2.0
#: The server listens a moment after the app has started.
FIRST_BEAT_SECONDS = 0.1


@dataclass(frozen=True)
class Description:
    """What an engine says of itself once.

    Attributes:
        url: where the api reaches it.
        base_model: the name of its base model.
        base_digest: of the model's weights.
        capacity: sequences that it decodes together.
    """

    url: str
    base_model: str
    base_digest: str
    capacity: int


class Registration:
    """The engine's row: there from its first answer on, renewed by a thread, gone when the engine leaves.

    A database that does not answer is tried again at every beat; a row that was swept meanwhile is written anew.
    """

    def __init__(
        self,
        sessions: sessionmaker[Session],
        description: Description,
        *,
        load: Callable[[], Load],
        interval: timedelta,
    ) -> None:
        """Nothing happens before `start`.

        Args:
            sessions: where the api looks.
            description: of this engine.
            load: asked at each heartbeat.
            interval: between two heartbeats.
        """
        #: Names the engine's process; its ``/readyz`` must say the same.
        self.id = new_id("engine-")
        self._sessions = sessions
        self._description = description
        self._load = load
        self._interval = interval.total_seconds()
        self._stopping = threading.Event()
        self._registered = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="engine-registration", daemon=True)

    def start(self) -> None:
        """Register as soon as the engine answers under its address."""
        self._thread.start()

    def leave(self) -> None:
        """Have the row deleted, so that no more requests are sent here; waits for nothing."""
        self._stopping.set()

    def stop(self) -> None:
        """Delete the row."""
        self.leave()
        self._thread.join()

    def _run(self) -> None:
        pause = FIRST_BEAT_SECONDS
        while not self._stopping.wait(pause):
            self._attempt(self._beat)
            pause = self._interval
        self._attempt(self._leave)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do it, whatever comes of it; an outage is logged when it begins and when it is over, not at each beat."""
        # Also writing a log line can fail (a closed pipe, a full disk), and an engine without its thread would serve
        # on where nobody looks for it.
        with suppress(Exception):
            self._try(action)

    def _try(self, action: Callable[[], None]) -> None:
        failing_before = self._failing
        try:
            action()
        except Exception as error:  # whatever it is, the next beat may do better
            self._failing = True
            if not failing_before:
                log.warning("engine_not_registered", url=self._description.url, error=str(error))
        else:
            self._failing = False
            if failing_before:
                log.info("engine_registered_again", url=self._description.url)

    def _beat(self) -> None:
        if not self._registered:
            self._check_address()
        with self._sessions.begin() as session:
            if not repository.renew(session, self.id, self._load()):
                self._register(session)
        first, self._registered = not self._registered, True
        if first:
            log.info("engine_registered", id=self.id, url=self._description.url)

    def _register(self, session: Session) -> None:
        found = self._description
        repository.add(
            session,
            engine_id=self.id,
            url=found.url,
            base_model=found.base_model,
            base_digest=found.base_digest,
            capacity=found.capacity,
        )

    def _check_address(self) -> None:
        """Nothing must be sent where another engine listens, or nobody.

        Raises:
            RuntimeError: this engine does not answer under its address.
        """
        url = self._description.url
        try:
            answer = httpx.get(f"{url}/readyz", timeout=CHECK_TIMEOUT_SECONDS, trust_env=False).json().get("id")
        except (httpx.HTTPError, ValueError) as error:
            answer = repr(error)
        if answer != self.id:
            raise RuntimeError(
                f"Under {url} another than this engine answers, or none: found {answer}, expected {self.id}. Set "
                "UORA_ENGINE_ADVERTISE_URL to the address and port that uvicorn was told for this engine."
            )

    def _leave(self) -> None:
        with self._sessions.begin() as session:
            repository.remove(session, self.id)
