"""A job that is watched, on a terminal and where there is none."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from cli.output import Json, console, printable, when
from cli.watching import Outage, Update, describe_progress

#: Lines of progress come no more often where each one stays.
PROGRESS_EVERY_SECONDS = 5.0
_STYLES = {"warn": "yellow", "error": "red"}


class View(Protocol):
    """What shows updates."""

    def show(self, update: Update) -> None:
        """Show the job, and its new events."""

    def outage(self, outage: Outage) -> None:
        """Show that the service is away, or back."""


def make_view() -> AbstractContextManager[View]:
    """For where the output goes."""
    screen = console()
    return LiveView(screen) if screen.is_terminal else nullcontext(LineView(screen))


class LineView:
    """A line for each event, and now and then one for the progress."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen
        self._shown: tuple[str, str] = ("", "")
        self._shown_at = -PROGRESS_EVERY_SECONDS
        self._away = False

    def show(self, update: Update) -> None:
        """Print what is new."""
        for event in update.events:
            self._print(describe_event(event))
        status, progress = update.job["status"], describe_progress(update.job)
        due = time.monotonic() - self._shown_at >= PROGRESS_EVERY_SECONDS
        if status != self._shown[0] or (due and (status, progress) != self._shown):
            self._print(f"{status}: {progress}" if progress else status)
            self._shown, self._shown_at = (status, progress), time.monotonic()

    def outage(self, outage: Outage) -> None:
        """One line at its beginning, one at its end."""
        if self._away != (outage.delay is not None):
            self._away = not self._away
            self._print("The service does not answer; trying again ..." if self._away else "The service answers again.")

    def _print(self, line: str | Text) -> None:
        self._screen.print(line, soft_wrap=True)
        self._screen.file.flush()  # who reads it from a pipe is watching, too


class LiveView(AbstractContextManager["LiveView"]):
    """A bar that stays at the bottom; events go by above it. Measurements are in the bar, so they have no lines."""

    def __init__(self, screen: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[details]}", markup=False),
        )
        self._progress = Progress(*columns, console=screen)
        self._task = self._progress.add_task("", total=None, details="")
        self._status = ""

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, update: Update) -> None:
        """Print new events, and draw the bar anew."""
        for event in update.events:
            if event["type"] != "metrics":
                self._progress.console.print(describe_event(event))
        progress = update.job.get("progress") or {}
        self._status = update.job["status"]
        self._progress.update(
            self._task,
            description=self._status,
            total=100 if progress else None,
            completed=progress.get("percent", 0),
            details=describe_progress(update.job),
        )

    def outage(self, outage: Outage) -> None:
        """In the place of the status."""
        away = outage.delay is not None
        text = "the service does not answer; trying again ..." if away else self._status
        self._progress.update(self._task, description=text)


def describe_event(event: Json) -> Text:
    """Time, level if it is no mere information, message."""
    level = "" if event["level"] == "info" else f"{event['level']}: "
    text = printable(f"{when(event['created_at'])}  {level}{event['message']}")
    return Text(text, style=_STYLES.get(event["level"], ""))
