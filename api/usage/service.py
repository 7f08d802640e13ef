"""Reading the ledger, in buckets that partition a period: pages of them neither skip nor repeat anything."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy.orm import Session, sessionmaker

from api.caller import Caller
from api.errors import InvalidRequest
from api.usage import repository
from api.usage.models import Operation
from api.usage.repository import AMOUNTS, MINUTE_SECONDS, StoredBytes, Total, UsageFilter
from api.usage.schemas import Width

#: What OpenAI's API counts as completions.
COMPLETIONS = (Operation.CHAT, Operation.COMPLETION)
#: Columns of `UsageKey` by what they are called on the wire.
_COLUMNS = {"api_key_id": "key_id"}
_CURSOR = "page_"
#: What tells the lines of a CSV apart, beside their time.
CSV_KEYS = ("api_key_id", "model", "operation")
CSV_HEADER = ("start_time", "end_time", *CSV_KEYS, *AMOUNTS)
#: With which a spreadsheet takes a text for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Period:
    """Whole minutes from ``since`` on until ``before``, in buckets of ``width``, of which ``limit`` make a page."""

    since: int
    before: int
    width: Width
    limit: int

    @classmethod
    def of(cls, *, start: int | None, end: int | None, width: Width, limit: int | None, page: str | None) -> Period:
        """The part of a period that a page begins with.

        Args:
            start: Unix seconds, as ``end``; None for as many buckets before the end as a page has.
            end: not included; None for now.
            width: of the buckets.
            limit: buckets of a page; None for the default.
            page: the cursor of the page before.

        Raises:
            InvalidRequest: the end is not after the start, there are too many buckets, or the cursor is none.
        """
        size = width.default_limit if limit is None else limit
        if size > width.max_limit:
            raise InvalidRequest(
                f"limit: found {size}; expected at most {width.max_limit} buckets of {width}. Ask for the next page.",
                param="limit",
            )
        before = _next_minute(int(time.time()) if end is None else end - 1)
        if start is None:
            last = before - 1
            start = last - last % width.seconds - (size - 1) * width.seconds
        since = start - start % MINUTE_SECONDS
        if end is not None and since >= before:
            raise InvalidRequest(f"end_time: found {end}; expected a time after start_time.", param="end_time")
        if page is not None:
            since = _read_cursor(page, since=since, before=before)
        return cls(since, before, width, size)

    def bounds(self) -> list[tuple[int, int]]:
        """Start and end of the page's buckets, clipped to the period."""
        found: list[tuple[int, int]] = []
        start = self.since
        while start < self.before and len(found) < self.limit:
            end = min(start - start % self.width.seconds + self.width.seconds, self.before)
            found.append((start, end))
            start = end
        return found


@dataclass(frozen=True)
class UsageBucket:
    """Its sums, one for each combination of what they are told apart by."""

    start: int
    end: int
    totals: Sequence[Total]


@dataclass(frozen=True)
class Buckets:
    """A page."""

    rows: Sequence[UsageBucket]
    next_page: str | None


def filter_for(
    caller: Caller, *, project_ids: Collection[str] = (), key_ids: Collection[str] = (), models: Collection[str] = ()
) -> UsageFilter:
    """Completions of the caller's project, or with an organization-wide key of all, or of those that are named."""
    if caller.organization_wide:
        visible = project_ids or None
    else:
        visible = {caller.project_id} & set(project_ids or (caller.project_id,))
    return UsageFilter(visible, key_ids, models, COMPLETIONS)


def read(session: Session, wanted: UsageFilter, period: Period, *, by: Collection[str]) -> Buckets:
    """A page of buckets, those without any usage included.

    Args:
        session: for reading.
        wanted: whose and which usage.
        period: whose first page.
        by: what sums are told apart by, as the wire calls it.
    """
    bounds = period.bounds()
    if not bounds:
        return Buckets([], next_page=None)
    begin, end = bounds[0][0], bounds[-1][1]
    columns = [_COLUMNS.get(name, name) for name in sorted(set(by))]
    found: dict[int, list[Total]] = {}
    width = period.width.seconds
    for total in repository.totals(session, wanted, since=begin, before=end, width=width, by=columns):
        found.setdefault(total.start, []).append(total)
    rows = [UsageBucket(start, stop, found.get(start - start % width, [])) for start, stop in bounds]
    return Buckets(rows, next_page=f"{_CURSOR}{end}" if end < period.before else None)


def bytes_stored(session: Session, caller: Caller) -> StoredBytes:
    """What the caller's project has stored now."""
    return repository.bytes_stored(session, caller.project_id)


def write_csv(sessions: sessionmaker[Session], wanted: UsageFilter, period: Period) -> Iterator[str]:
    """The whole period as CSV, page by page: however long it is, and however slowly it is read, no page of it is held
    any longer than it is sent, and no connection."""
    yield _csv_lines([CSV_HEADER])
    part: Period | None = replace(period, limit=period.width.max_limit)
    while part is not None:
        with sessions() as session:
            page = read(session, wanted, part, by=CSV_KEYS)
        lines = _csv_lines([_csv_row(bucket, total) for bucket in page.rows for total in bucket.totals])
        if lines:
            yield lines
        part = None if page.next_page is None else replace(part, since=page.rows[-1].end)


def _csv_row(bucket: UsageBucket, total: Total) -> list[object]:
    names = (_text(total.by[_COLUMNS.get(name, name)]) for name in CSV_KEYS)
    amounts = (getattr(total.amounts, name) for name in AMOUNTS[:-1])
    return [_iso(bucket.start), _iso(bucket.end), *names, *amounts, round(total.amounts.seconds, 3)]


def _csv_lines(rows: Sequence[Sequence[object]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\r\n").writerows(rows)
    return lines.getvalue()


def _text(value: str) -> str:
    """As a text in every spreadsheet."""
    return f"'{value}" if value.startswith(_FORMULA) else value


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _next_minute(seconds: int) -> int:
    return seconds - seconds % MINUTE_SECONDS + MINUTE_SECONDS


def _read_cursor(page: str, *, since: int, before: int) -> int:
    number = page.removeprefix(_CURSOR)
    if number == page or not (number.isascii() and number.isdecimal() and since < int(number) < before):
        raise InvalidRequest(f"page: found {page!r}; expected the next_page of the page before.", param="page")
    return int(number)
