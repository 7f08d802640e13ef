"""Following a job to its end, also across restarts of the service: no event is skipped, none comes twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cli.output import Json, as_dict

if TYPE_CHECKING:
    import openai
    from openai import OpenAI

T = TypeVar("T")

ENDED = frozenset({"succeeded", "failed", "cancelled"})
#: How long the service lets a request wait for the job to change. An event that comes without a change of its job, as
#: few do, is seen after that time.
WAIT_SECONDS = 5.0
#: A service that says nothing for so long after that is taken as gone.
SILENCE_SECONDS = 15.0
FIRST_DELAY, LONGEST_DELAY = 0.25, 10.0
EVENTS_AT_ONCE = 100


@dataclass(frozen=True)
class Update:
    """The job as it is now, and the events since the last update, oldest first."""

    job: Json
    events: list[Json]

    @property
    def ended(self) -> bool:
        """Whether it is the last one."""
        return self.job["status"] in ENDED


@dataclass(frozen=True)
class Outage:
    """The service does not answer; ``delay`` is until it is asked again, and None when it answers again."""

    delay: float | None


class Follower:
    """Asks for a job and its events again and again."""

    def __init__(self, client: OpenAI, job_id: str, *, on_outage: Callable[[Outage], None]) -> None:
        self._client = client.with_options(max_retries=0)  # it tries again itself, and says so
        self._job_id = job_id
        self._on_outage = on_outage
        self._job: Json = {}
        self._tag: str | None = None
        self._events_tag: str | None = None
        self._cursor: str | None = None

    def updates(self, *, tail: int | None = None) -> Generator[Update, None, None]:
        """All updates until the job has ended; raises what the service answers, but for its absence.

        Args:
            tail: how many of the events so far come first; None for all.
        """
        self._look(wait=0)  # a wrong address or key is told at once
        last = self._patiently(lambda: self._last_events(tail)) if tail is not None else []
        while True:
            # What was there when the job was read is read after it, so that the last update has the last event.
            yield Update(self._job, last + self._new_events())
            if self._job["status"] in ENDED:
                return
            last = []
            self._patiently(lambda: self._look(wait=WAIT_SECONDS))

    def _look(self, *, wait: float) -> None:
        """The job, once it is another one than before, or the time is over."""
        answer = _unless_unchanged(
            lambda: self._client.fine_tuning.jobs.with_raw_response.retrieve(
                self._job_id,
                extra_query={"wait": wait},
                extra_headers=_if_changed(self._tag),
                timeout=wait + SILENCE_SECONDS,
            )
        )
        if answer is not None:
            self._tag, self._job = answer.headers.get("etag"), as_dict(answer.parse())

    def _new_events(self) -> list[Json]:
        events: list[Json] = []
        more = True
        while more:
            page = self._patiently(self._page)
            events += page["data"]
            more = page["has_more"]
        return events

    def _page(self) -> Json:
        """The events behind the cursor, which moves on only with an answer that arrived."""
        query: Json = {"order": "asc"} | ({"after": self._cursor} if self._cursor else {})
        answer = _unless_unchanged(
            lambda: self._client.fine_tuning.jobs.with_raw_response.list_events(
                self._job_id,
                limit=EVENTS_AT_ONCE,
                extra_query=query,
                extra_headers=_if_changed(self._events_tag),
                timeout=SILENCE_SECONDS,
            )
        )
        if answer is None:
            return {"data": [], "has_more": False}
        page = answer.parse()
        found = {"data": [as_dict(event) for event in page.data], "has_more": bool(page.has_more)}
        self._cursor = page.data[-1].id if page.data else self._cursor
        # The tag is of all events, so it says nothing as long as some were not read.
        self._events_tag = None if found["has_more"] else answer.headers.get("etag")
        return found

    def _last_events(self, count: int) -> list[Json]:
        """The last events so far, oldest first; new ones are those after them."""
        page = self._client.fine_tuning.jobs.list_events(self._job_id, limit=max(count, 1), timeout=SILENCE_SECONDS)
        self._cursor = page.data[0].id if page.data else None
        return [as_dict(event) for event in reversed(page.data[:count])]

    def _patiently(self, ask: Callable[[], T]) -> T:
        """The answer, however long the service is away."""
        import openai

        for attempt in count():
            try:
                answer = ask()
            except openai.APIError as error:
                if not _may_pass(error):
                    raise
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0)  # noqa: S311
                self._on_outage(Outage(delay))
                time.sleep(delay)
            else:
                if attempt:
                    self._on_outage(Outage(None))
                return answer
        raise AssertionError("unreachable")


def _may_pass(error: openai.APIError) -> bool:
    """Whether the service may answer soon: it is down, starting, or too busy."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500 or error.status_code in (408, 429)
    return isinstance(error, openai.APIConnectionError)


def _if_changed(tag: str | None) -> dict[str, str]:
    return {} if tag is None else {"If-None-Match": tag}


def _unless_unchanged(ask: Callable[[], T]) -> T | None:
    """The answer; None for a 304, which the client takes for an error."""
    import openai

    try:
        return ask()
    except openai.APIStatusError as error:
        if error.status_code == 304:
            return None
        raise


def describe_progress(job: Json) -> str:
    """``step 3/10, loss 1.23, 5,000 tokens/s, 12 s left``, as far as it is known."""
    if job["status"] == "queued" and (place := job.get("queue_position")):
        return f"number {place} in the queue"
    progress = cast(dict[str, Any], job.get("progress") or {})
    parts = []
    if "step" in progress:
        parts.append(f"step {progress['step']}/{progress['total_steps']}")
    for name, form in (
        ("train_loss", "loss {:.4g}"),
        ("valid_loss", "validation loss {:.4g}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("seconds_left", "{:,.0f} s left"),
    ):
        if progress.get(name) is not None:
            parts.append(form.format(progress[name]))
    return ", ".join(parts)
