"""``docs/choosing.md``: which method, rank and rate to take for which data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.study import hits
from benchmarks.study.findings import GENERATED, state
from benchmarks.study.markdown import NOTHING, number, paragraphs, points, rate, table
from benchmarks.study.plan import DEFAULT_RANKS, TARGETS_TASKS, Config, Part, Study, Task
from benchmarks.study.results import Mean, Result, Results, compare, gain
from benchmarks.study.scoring import TITLES
from benchmarks.study.tables import PART_TITLES, digits, main_table, targets_table
from uora.spec import METHODS, UoraSpec, parse_adapter

#: What the data of a part is like.
_DATA: dict[Part, str] = {
    "glue": "texts or pairs of texts with a class or a number",
    "e2e": "prompts with completions",
    "chat": "conversations",
    "images": "images with a class",
}


@dataclass(frozen=True)
class Candidate:
    """An adapter on the tasks of a part: its average, and what it costs."""

    config: Config
    mean: Mean
    results: tuple[Result, ...]

    @property
    def stored_bytes(self) -> int:
        """At most."""
        return max(each.stored_bytes for each in self.results)

    @property
    def rates(self) -> str:
        """The tuned ones, from the lowest to the highest."""
        found = sorted({each.learning_rate for each in self.results})
        return rate(found[0]) if len(found) == 1 else f"{rate(found[0])} to {rate(found[-1])}"


def candidates(results: Results, part: Part) -> list[Candidate]:
    """The adapters of a part; none unless all of them are complete, since a choice among some is none."""
    tasks = results.study.in_part(part)
    adapters = [config for config in results.study.configs(tasks[0]) if config.method in METHODS]
    found = [_candidate(results, tasks, config) for config in adapters]
    complete = [each for each in found if each is not None]
    return complete if len(complete) == len(adapters) else []


def _candidate(results: Results, tasks: Sequence[Task], config: Config) -> Candidate | None:
    mean = results.average(tasks, config)
    each = [results.complete(task, config) for task in tasks]
    return None if mean is None else Candidate(config, mean, tuple(found for found in each if found is not None))


def best(found: Sequence[Candidate], metric: str) -> Candidate:
    """Of the highest score, or the lowest loss."""
    return max(found, key=lambda each: gain(metric, each.mean, Mean(0.0, None)))


def as_good(found: Sequence[Candidate], metric: str) -> list[Candidate]:
    """The best and what ties with it by the spread over seeds, the smallest first."""
    top = best(found, metric)
    good = [each for each in found if each is top or compare(metric, each.mean, top.mean) == "ties"]
    return sorted(good, key=lambda each: each.stored_bytes)


def cheapest(found: Sequence[Candidate], metric: str) -> Candidate:
    """The smallest of those."""
    return as_good(found, metric)[0]


def page(results: Results) -> str:
    """The whole page."""
    return paragraphs(
        GENERATED,
        "# Which method, rank and learning rate?",
        state(results),
        "Everything here is measured: [results.md](results.md) has all tables, seeds and commands.",
        _choices(results),
        "The smallest is the adapter with the fewest stored bytes whose score ties with the best one's: their "
        "difference is not larger than both spreads over seeds together. Where you have room, take the best.",
        "![Scores against stored bytes, all methods](images/playground.svg)",
        "## Defaults of the service",
        _defaults(results),
        *_evidence(results),
        "## Learning rates",
        "The best of each method on rows held out of train, and in brackets what the service's default loses against "
        "it, where that was tried. A job that gives no `learning_rate` has the default, which is between the "
        "best ones, below the rates with which training falls apart, at the right end of the curves.",
        _rates_by_method(results),
        "The whole curves:",
        *[f"![{PART_TITLES[part]}: score by learning rate](images/rates-{part}.svg)" for part in _DATA],
    )


def _choices(results: Results) -> str:
    header = ["your data is", "smallest that is as good as the best", "others that are, larger", "best"]
    return table(
        [*header, "rate", "stored bytes", "the best's", "difference"],
        [_choice(results, part) for part in _DATA],
        words=4,
    )


def _choice(results: Results, part: Part) -> list[str]:
    metric = results.study.in_part(part)[0].metric
    found = candidates(results, part)
    if not found:
        return [_DATA[part], "not measured yet", *["-"] * 6]
    small, *others = as_good(found, metric)
    top = best(found, metric)
    return [
        f"{_DATA[part]} ({PART_TITLES[part]}), {small.config.targets}",
        f"**{small.config.label}**",
        ", ".join(each.config.label for each in others) or "none",
        top.config.label,
        small.rates,
        number(small.stored_bytes),
        number(top.stored_bytes),
        points(gain(metric, small.mean, top.mean), digits(metric)),
    ]


def _defaults(results: Results) -> str:
    """The defaults as the code has them, beside what was measured."""
    spec = UoraSpec()
    rows = [
        ["`method`", f"`{spec.method}`", _of_parts(results, lambda each: each.config.method)],
        ["`r`", f"{spec.r}", _of_parts(results, lambda each: f"{each.config.method} {each.config.r}")],
        ["`targets`", f"`{spec.targets}`", _targets(results)],
        ["`learning_rate`", rate(spec.base_learning_rate), _uora_rates(results)],
        ["`tau`", f"{spec.tau:g}", hits.sentence(results)],
    ]
    return table(["setting", "default", "what was measured"], rows, words=3)


def _of_parts(results: Results, told: Callable[[Candidate], str]) -> str:
    """What the smallest as good as the best has, part by part."""
    found = []
    for part in _DATA:
        adapters = candidates(results, part)
        if adapters:
            chosen = cheapest(adapters, results.study.in_part(part)[0].metric)
            found.append(f"{PART_TITLES[part]}: {told(chosen)}")
    return "; ".join(found) or "not measured yet"


def _targets(results: Results) -> str:
    """UORA at one rank on query and value, and on all linear layers."""
    tasks = [task for task in results.study.tasks if task.name in TARGETS_TASKS]
    narrow, wide = results.study.main(tasks[0]), results.study.wide(tasks[0])
    means = [results.average(tasks, config) for config in (narrow, wide)]
    if means[0] is None or means[1] is None:
        return "not measured yet"
    verdict = compare(tasks[0].metric, means[1], means[0])
    return (
        f"{wide.label} on {', '.join(task.title for task in tasks)}: {wide.targets} {means[1].text(1)}, "
        f"{narrow.targets} {means[0].text(1)}{f' (all-linear {verdict})' if verdict else ''}"
    )


def _uora_rates(results: Results) -> str:
    """The best of the default adapter, which is on all linear layers."""
    study = results.study
    found = [
        f"{task.title} {rate(result.learning_rate)}"
        for task in study.tasks
        if task.rates_of is None and (result := results.find(task, study.wide(task))) is not None
    ]
    best_of = f"best on held-out rows of train: {', '.join(found)}; " if found else ""
    return f"{best_of}[every method's](#learning-rates)"


def _rates_by_method(results: Results) -> str:
    """Default and best rates at the usual ranks, on every task that was tuned."""
    tasks = [task for task in results.study.tasks if task.rates_of is None]
    compared = [(method, method, partial(_usual, results.study, method)) for method in METHODS]
    compared.append(("uora, all-linear", "uora", partial(Study.wide, results.study)))
    rows = [
        [name, rate(_default_rate(method)), *(_best_rate(results, task, config_of(task)) for task in tasks)]
        for name, method, config_of in compared
    ]
    titles = [f"{task.title} ({TITLES[task.tuning_metric or task.metric]})" for task in tasks]
    return table(["method", "default", *titles], rows)


def _default_rate(method: str) -> float:
    return parse_adapter({"method": method}).base_learning_rate


def _usual(study: Study, method: str, task: Task) -> Config | None:
    """A method as a task's main table has it at its usual rank."""
    found = [each for each in study.configs(task) if (each.method, each.r) == (method, DEFAULT_RANKS[method])]
    return found[0] if found else None


def _best_rate(results: Results, task: Task, config: Config | None) -> str:
    result = results.find(task, config) if config else None
    if result is None:
        return NOTHING
    scores = {line.learning_rate: Mean.of([line.score]) for line in results.tuning(task, result.config)}
    default, best_rate = _default_rate(result.config.method), result.learning_rate
    if default not in scores or default == best_rate:
        return rate(best_rate)
    metric = task.tuning_metric or task.metric
    return f"{rate(best_rate)} ({points(gain(metric, scores[default], scores[best_rate]), digits(metric))})"


def _evidence(results: Results) -> list[str]:
    """The tables that the defaults rest on."""
    parts: list[str] = []
    for part in _DATA:
        body = main_table(results, results.study.in_part(part))
        parts += [f"### {PART_TITLES[part]}", body] if body else []
    targets = targets_table(results)
    return [*parts, *(["### Targets", targets] if targets else [])]
