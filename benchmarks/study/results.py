"""Lines put together: a result is one configuration on one task over its seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from benchmarks.study.lines import Line, Lines
from benchmarks.study.plan import NONE, Config, Planned, Run, Study, Task, plan
from benchmarks.study.scoring import lower_is_better
from uora.spec import METHODS

Verdict = Literal["wins", "ties", "loses"]


@dataclass(frozen=True)
class Mean:
    """A mean with the standard deviation over seeds; None where there is one seed only."""

    value: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Over seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    @classmethod
    def over_tasks(cls, means: Sequence[Mean]) -> Mean:
        """The average of tasks, whose seeds know nothing of each other."""
        spreads = [mean.spread for mean in means if mean.spread is not None]
        spread = math.hypot(*spreads) / len(means) if len(spreads) == len(means) else None
        return cls(statistics.fmean(mean.value for mean in means), spread)

    def text(self, digits: int) -> str:
        """As in a table."""
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


def gain(metric: str, a: Mean, b: Mean) -> float:
    """By how much ``a`` is better."""
    return b.value - a.value if lower_is_better(metric) else a.value - b.value


def compare(metric: str, a: Mean, b: Mean) -> Verdict | None:
    """What ``a`` does against ``b``; None where one seed says nothing of the spread.

    A difference counts where it is larger than both spreads together, the root of the sum of their squares.
    """
    if a.spread is None or b.spread is None:
        return None
    difference, both = gain(metric, a, b), math.hypot(a.spread, b.spread)
    if abs(difference) <= both:
        return "ties"
    return "wins" if difference > 0 else "loses"


#: A machine and its threads: only seconds that were measured with the same are compared.
Clock = tuple[str, int]


def clock_of(line: Line) -> Clock:
    """What a line's seconds were measured with."""
    return line.machine, line.threads


@dataclass(frozen=True)
class Result:
    """A configuration on a task. ``planned`` seeds are wanted; ``lines`` are those that are there."""

    task: Task
    config: Config
    lines: tuple[Line, ...]
    planned: int

    @property
    def complete(self) -> bool:
        """Whether all seeds are there."""
        return len(self.lines) == self.planned

    @cached_property
    def mean(self) -> Mean:
        """Of the task's metric."""
        return Mean.of([line.score for line in self.lines])

    def other(self, name: str) -> Mean:
        """Of another score."""
        return Mean.of([line.scores[name] for line in self.lines])

    @property
    def trainable_parameters(self) -> int:
        """Without the head's."""
        return self.lines[0].trainable_parameters

    @property
    def stored_bytes(self) -> int:
        """With the head."""
        return max(line.stored_bytes for line in self.lines)

    def seconds_per_thousand(self, clock: Clock) -> float | None:
        """Seconds of training for 1,000 tokens, or images, by one clock; None where nothing was trained by it."""
        lines = [line for line in self.lines if line.steps and clock_of(line) == clock]
        units = sum(line.tokens or line.rows * line.epochs for line in lines)
        return 1000 * sum(line.seconds for line in lines) / units if units else None

    @property
    def hits(self) -> Mean:
        """Of the reinitialisation, per job."""
        return Mean.of([float(line.hits) for line in self.lines])

    @property
    def learning_rate(self) -> float:
        """The tuned one."""
        return self.lines[0].learning_rate


@dataclass(frozen=True)
class Results:
    """Everything that the lines say about a study."""

    study: Study
    lines: Lines

    @cached_property
    def planned(self) -> Planned:
        """Runs that the study has as far as is known, made or not."""
        return plan(self.study, self.lines)

    @cached_property
    def clock(self) -> Clock:
        """That of most lines."""
        return Counter(map(clock_of, self.lines.all())).most_common(1)[0][0]

    @cached_property
    def _runs(self) -> dict[tuple[str, Config], list[Run]]:
        found: dict[tuple[str, Config], list[Run]] = {}
        for run in self.planned.runs:
            if run.purpose == "test":
                found.setdefault((run.task.name, run.config), []).append(run)
        return found

    def find(self, task: Task, config: Config) -> Result | None:
        """What is known of a configuration; None for nothing."""
        runs = self._runs.get((task.name, config), [])
        lines = [line for run in runs if (line := self.lines.find(run.key)) is not None]
        return Result(task, config, tuple(lines), len(runs)) if lines else None

    def complete(self, task: Task, config: Config) -> Result | None:
        """The same if all its seeds are there: nothing is judged by less."""
        found = self.find(task, config)
        return found if found is not None and found.complete else None

    def average(self, tasks: Sequence[Task], config: Config) -> Mean | None:
        """Over tasks; None unless all are complete."""
        found = [self.complete(task, config) for task in tasks]
        means = [each.mean for each in found if each is not None]
        return Mean.over_tasks(means) if found and len(means) == len(found) else None

    def above_commonest(self, task: Task) -> list[Config] | None:
        """Rows of a main table that beat always saying the commonest class by more than their spread over seeds.

        None where it is not known: a row is missing, or the task has no head.
        """
        configs = self.study.configs(task)
        found = {config: each.mean for config in configs if (each := self.complete(task, config)) is not None}
        if not task.has_head or len(found) < len(configs):
            return None
        floor = found.pop(NONE).value
        return [config for config, mean in found.items() if mean.value - (mean.spread or 0.0) > floor]

    def tells(self, task: Task) -> bool:
        """Whether its scores tell adapters apart: not so if all are known, and none is above the commonest class."""
        above = self.above_commonest(task)
        return above is None or any(config.method in METHODS for config in above)

    def tuning(self, task: Task, config: Config) -> list[Line]:
        """Of a configuration's learning rate, lowest first; those of the present plan."""
        runs = [run for run in self.planned.runs if run.purpose == "tune"]
        own = [run for run in runs if (run.task.name, run.config) == (task.name, config.tuned)]
        found = [line for run in own if (line := self.lines.find(run.key)) is not None]
        return sorted(found, key=lambda line: line.learning_rate)

    def heads(self, task: Task) -> list[Line]:
        """The main adapter with its best rate and others of the head, lowest first."""
        runs = [run for run in self.planned.runs if (run.purpose, run.task.name) == ("head", task.name)]
        found = [line for run in runs if (line := self.lines.find(run.key)) is not None]
        return sorted(found, key=lambda line: line.head_learning_rate or 0.0)

    def count(self, chosen: Callable[[Run], bool]) -> tuple[int, int]:
        """Of the planned runs so chosen: how many have their line, how many there are."""
        runs = [run for run in self.planned.runs if chosen(run)]
        return sum(self.lines.find(run.key) is not None for run in runs), len(runs)
