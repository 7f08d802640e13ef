"""What the reinitialisation brings: settings beside a control without it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.study.markdown import NOTHING, number, points, table
from benchmarks.study.plan import REINIT_TASKS, REINITIALISATIONS, Settings, Task
from benchmarks.study.results import Result, Results, Verdict, compare, gain
from benchmarks.study.tables import score_text

#: Without any reinitialisation, the default, and the others.
CONTROL, DEFAULT, OTHERS = REINITIALISATIONS[0], (), REINITIALISATIONS[1:]


@dataclass(frozen=True)
class Trial:
    """A setting on a task beside the control there. ``verdict`` is None where the spread is not known."""

    result: Result
    gain: float
    verdict: Verdict | None

    @property
    def label(self) -> str:
        """For a sentence."""
        return f"{self.result.task.title} with {setting(self.result.config.settings)}"


def tasks(results: Results) -> list[Task]:
    """On which it was tried."""
    return [task for task in results.study.tasks if task.name in REINIT_TASKS]


def find(results: Results, task: Task, settings: Settings) -> Result | None:
    """A setting's result."""
    return results.find(task, replace(results.study.main(task), settings=settings))


def trial(results: Results, task: Task, settings: Settings) -> Trial | None:
    """A setting and the control, if both have all seeds."""
    result, control = find(results, task, settings), find(results, task, CONTROL)
    if result is None or control is None or not (result.complete and control.complete):
        return None
    means = task.metric, result.mean, control.mean
    return Trial(result, gain(*means), compare(*means))


def _trials(results: Results) -> Iterator[Trial]:
    for task in tasks(results):
        for settings in (DEFAULT, *OTHERS):
            found = trial(results, task, settings)
            if found is not None:
                yield found


def section(results: Results) -> list[str]:
    """The table and the plot."""
    rows = []
    for settings in (CONTROL, DEFAULT, *OTHERS):
        cells = [cell for task in tasks(results) for cell in _cells(results, task, settings)]
        if any(cell != NOTHING for cell in cells):
            rows.append([setting(settings), *cells])
    header = ["setting", *(head for task in tasks(results) for head in (f"{task.title} hits", task.title))]
    explained = (
        "Hits are the mean of a job. Each cell has the score, and its difference from the control without "
        "reinitialisation (`tau` 0, the first row) with what it amounts to by the spread over seeds. The settings "
        "of a task share its control, so their differences are not independent. A job without hits is the control."
    )
    return [
        "## Reinitialisation",
        *([table(header, rows), explained] if rows else ["Not measured yet."]),
        "![Hits of a job and what they change](images/reinitialisation.svg)",
    ]


def setting(settings: Settings) -> str:
    """As a user would write it."""
    return " ".join(f"`{name}={value}`" for name, value in settings) or "`tau=1e-05` (default)"


def _cells(results: Results, task: Task, settings: Settings) -> list[str]:
    result = find(results, task, settings)
    if result is None:
        return [NOTHING, NOTHING]
    text, found = score_text(result), trial(results, task, settings)
    if found is not None and settings != CONTROL:
        text += f" ({points(found.gain)}{f', {found.verdict}' if found.verdict else ''})"
    return [number(result.hits.value, 1), text]


def sentence(results: Results) -> str:
    """What hits bring, over all tasks that tell adapters apart."""
    trials = list(_trials(results))
    if not trials:
        return "The reinitialisation: not measured yet."
    usual = [each.result.hits.value for each in trials if each.result.config.settings == DEFAULT]
    default = f"At the default tau a job has {statistics.fmean(usual):.1f} hits. " if usual else ""
    silent = [task.title for task in tasks(results) if not results.tells(task)]
    said = f" Not counted, since no adapter learns anything there: {' and '.join(silent)}." if silent else ""
    hit = [each for each in trials if each.result.hits.value > 0 and results.tells(each.result.task)]
    if not hit:
        return f"The reinitialisation: {default}No setting that counts had a hit, so **it changes nothing**.{said}"
    return f"The reinitialisation: {default}{_counted(hit)}{said}"


def _counted(hit: list[Trial]) -> str:
    better = [each.label for each in hit if each.verdict == "wins"]
    worse = [each.label for each in hit if each.verdict == "loses"]
    mean = statistics.fmean(each.gain for each in hit)
    named = f" Better: {', '.join(better) or 'none'}. Worse: {', '.join(worse) or 'none'}." if better or worse else ""
    verdict = "" if better else " **It brings nothing that the spread over seeds would not explain.**"
    return (
        f"Of {len(hit)} settings with hits, {len(better)} beat the control without it, "
        f"{len(hit) - len(better) - len(worse)} tie and {len(worse)} lose; on average {points(mean, 2)} "
        f"points.{named}{verdict}"
    )
