"""Tables of scores, with what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.lines import Line
from benchmarks.study.markdown import NOTHING, number, rate, table
from benchmarks.study.plan import HEAD_RATES, HEAD_TASKS, NONE, TARGETS_TASKS, Config, Part, Task
from benchmarks.study.results import Result, Results
from benchmarks.study.scoring import TITLES, lower_is_better

PART_TITLES: dict[Part, str] = {
    "glue": "GLUE",
    "e2e": "E2E",
    "chat": "Chat",
    "images": "Images",
    "reinit": "Reinitialisation",
    "targets": "Targets",
}


def main_table(results: Results, tasks: Sequence[Task]) -> str:
    """Rows of methods; empty if nothing is there."""
    configs = results.study.configs(tasks[0])
    rows = [_row(results, tasks, config) for config in configs if _some(results, tasks, config)]
    if not rows:
        return ""
    scores = [f"{task.title} ({TITLES[task.metric]})" for task in tasks]
    average = ["average"] if len(tasks) > 1 else []
    unit = "images" if tasks[0].part == "images" else "tokens"
    more = [name.replace("rouge_l", "ROUGE-L").replace("nist", "NIST") for name in _more(tasks)]
    return table(
        ["method", *scores, *more, *average, "trained numbers", "stored bytes", f"seconds per 1,000 {unit}"], rows
    )


def _more(tasks: Sequence[Task]) -> list[str]:
    return ["rouge_l", "nist"] if tasks[0].metric == "bleu" else []


def _some(results: Results, tasks: Sequence[Task], config: Config) -> list[Result]:
    return [found for task in tasks if (found := results.find(task, config)) is not None]


def _row(results: Results, tasks: Sequence[Task], config: Config) -> list[str]:
    found = [results.find(task, config) for task in tasks]
    some = [each for each in found if each is not None]
    timed = [each.seconds_per_thousand(results.clock) for each in some]
    seconds = [each for each in timed if each is not None]
    mean = results.average(tasks, config)
    average = [mean.text(1) if mean else NOTHING] if len(tasks) > 1 else []
    return [
        shown(tasks[0], config),
        *(score_text(each) for each in found),
        *(some[0].other(name).text(2 if name == "nist" else 1) for name in _more(tasks)),
        *average,
        number(some[0].trainable_parameters),
        number(max(each.stored_bytes for each in some)),
        # Of all tasks or none: their rows differ in length, and short ones take longer for each token.
        number(sum(seconds) / len(seconds), 2) if len(seconds) == len(tasks) else NOTHING,
    ]


_SHOWN = {"full": "full fine-tuning", "head": "head only"}


def shown(task: Task, config: Config) -> str:
    """A row's name."""
    if config == NONE:
        return "commonest class" if task.has_head else "untrained"
    return _SHOWN.get(config.method, config.label)


def score_text(result: Result | None) -> str:
    if result is None:
        return NOTHING
    marked = "" if result.complete else f" ({len(result.lines)} of {result.planned} seeds)"
    return result.mean.text(digits(result.task.metric)) + marked


def digits(metric: str) -> int:
    return 3 if lower_is_better(metric) else 1


def targets_table(results: Results) -> str:
    """All linear layers beside the rows of the main table that they compare with; empty if nothing is there."""
    tasks = [task for task in results.study.tasks if task.name in TARGETS_TASKS]
    configs = [results.study.main(tasks[0]), named(results, tasks[0], "lora"), results.study.wide(tasks[0])]
    rows = [
        [f"{config.label}, {config.targets}", *_row(results, tasks, config)[1:]]
        for config in configs
        if _some(results, tasks, config)
    ]
    header = ["method, targets", *(task.title for task in tasks), "average", "trained numbers", "stored bytes"]
    return table([*header, "seconds per 1,000 tokens"], rows) if rows else ""


def heads_table(results: Results) -> str:
    """What the head's learning rate does beside the main adapter; empty if nothing is there."""
    tasks = [results.study.task(name) for name in HEAD_TASKS]
    rows = [
        [task.title, rate(lines[0].learning_rate), *(_at(lines, each, digits(lines[0].metric)) for each in HEAD_RATES)]
        for task in tasks
        if (lines := results.heads(task))
    ]
    main = results.study.main(tasks[0])
    header = [f"{main.label}, {main.targets}", "its rate", *(f"head at {rate(each)}" for each in HEAD_RATES)]
    return table(header, rows) if rows else ""


def _at(lines: Sequence[Line], head_rate: float, places: int) -> str:
    scores = [line.score for line in lines if line.head_learning_rate == head_rate]
    return f"{scores[0]:.{places}f}" if scores else NOTHING


def named(results: Results, task: Task, method: str) -> Config:
    """The row of a main table."""
    return next(each for each in results.study.configs(task) if each.method == method)


def complete(results: Results, task: Task, config: Config) -> Result:
    found = results.complete(task, config)
    assert found is not None  # noqa: S101 # as the caller has seen
    return found
