"""What is run: tasks with their sizes, configurations, seeds and learning rates. Everything else follows from it.

A run is named by its `Run.key`, in which everything is that its result depends on; a run whose line is there is not
made again. Learning rates are tuned for each method, rank and targets on each task that does not take another's: the
tuning runs go up and down a ladder of rates from a rate that suits the method until the best one has a worse one on
each side, and then try one more in between on each: near where a training breaks, three times a rate is far. Beside
whatever is trained, heads have one rate, `HEAD_RATE`; what others do beside the main adapter is looked at by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.study.lines import Line, Lines
from benchmarks.study.scoring import Metric, lower_is_better
from uora.spec import METHODS
from uora.spec import Task as Kind

ENCODER, WRITER, VISION = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct", "ViT-S-14"
Part = Literal["glue", "e2e", "chat", "images", "reinit", "targets"]
PARTS: tuple[Part, ...] = ("glue", "e2e", "chat", "images", "reinit", "targets")
Purpose = Literal["tune", "head", "test"]
Settings = tuple[tuple[str, str | int | float], ...]
TUNING_SEED = 0
#: Rates on each side of the first that are tried before anything is known, and the most steps away from it.
_FIRST_REACH, _LAST_REACH = 1, 3


@dataclass(frozen=True)
class Config:
    """A method as it is set up; ``settings`` are those of the reinitialisation."""

    method: str
    r: int | None = None
    targets: str | None = None
    settings: Settings = ()

    def adapter(self) -> dict[str, Any]:
        """As `uora.spec.parse_adapter` takes it."""
        return {"method": self.method, "r": self.r, "targets": self.targets} | dict(self.settings)

    @property
    def tuned(self) -> Config:
        """Whose learning rate it takes: the same without settings of the reinitialisation."""
        return replace(self, settings=())

    @property
    def label(self) -> str:
        """For keys and tables."""
        rank = f" r={self.r}" if self.r else ""
        settings = "".join(f" {name}={value}" for name, value in self.settings)
        return f"{self.method}{rank}{settings}"


@dataclass(frozen=True)
class Size:
    """Rows to train on, rows to score (None for all), and epochs."""

    train: int
    test: int | None
    epochs: int


#: The tuning of a task that takes the rates of another.
_NO_ROWS = Size(0, 0, 0)


@dataclass(frozen=True)
class Task:
    """A data set with its metric."""

    name: str
    title: str
    part: Part
    base: str
    kind: Kind
    metric: Metric
    size: Size
    #: Of the tuning: rows to train on, rows of train to score, epochs.
    tuning: Size
    batch: int
    #: Seconds that a training row took once, for estimates before there are lines (see ``benchmarks.quality``).
    row_seconds: float
    seeds: tuple[int, ...] = (0, 1, 2)
    max_length: int = 128
    #: By which learning rates are told apart, if not by the metric.
    tuning_metric: Metric | None = None
    #: The task whose learning rates it takes, if it has no tuning of its own.
    rates_of: str | None = None

    @property
    def has_head(self) -> bool:
        """Whether a head is trained."""
        return self.kind not in ("chat", "completion")


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    part: Part
    task: Task
    config: Config
    purpose: Purpose
    learning_rate: float
    seed: int
    #: Of the head beside an adapter or all weights; None where there is none, or nothing but a head.
    head_rate: float | None = None

    @property
    def size(self) -> Size:
        """Of this run."""
        return self.task.size if self.purpose == "test" else self.task.tuning

    @property
    def metric(self) -> Metric:
        """Of its score."""
        return self.task.metric if self.purpose == "test" else self.task.tuning_metric or self.task.metric

    @property
    def key(self) -> str:
        """Names it, and what its result depends on: rows, epochs and batch, rows scored, configuration, rate, seed."""
        size = self.size
        rows = f"{size.train}x{size.epochs} of {self.task.batch}, {size.test or 'all'}"
        where = f" on {self.config.targets}" if self.config.targets else ""
        rate = f"{self.learning_rate:g}" + (f", head {self.head_rate:g}" if self.head_rate else "")
        return f"{self.task.name}/{rows}/{self.config.label}{where}/rate {rate}/seed {self.seed}/{self.purpose}"


GLUE_TARGETS = "q,v"
WRITER_TARGETS = "all-linear"
#: A learning rate that suits a method, from which tuning goes on: near the best of SST-2's tuning.
FIRST_RATES = {
    "uora": 1e-1, "vera": 1e-1, "lora": 3e-3, "olora": 3e-3, "osora": 3e-2, "full": 1e-4, "head": 3e-2, "none": 1.0,
}  # fmt: skip
HEAD = Config("head")
#: No training: a writer as it is; of classes always the commonest, of numbers their mean.
NONE = Config("none")
#: Of the head beside an adapter or all weights, and what else is tried beside the main adapter.
HEAD_RATE, HEAD_RATES = 1e-2, (1e-3, 1e-2, 1e-1)
HEAD_TASKS = ("sst2", "stsb")
DEFAULT_RANKS = {"uora": 64, "vera": 64, "lora": 8, "olora": 8, "osora": 64}
#: Settings of the reinitialisation beside the default, ``tau`` 1e-5 shared by all layers, which every part has.
REINITIALISATIONS: tuple[Settings, ...] = (
    (("tau", 0.0),),
    (("tau", 1e-4),),
    (("tau", 1e-3),),
    (("tau", 1e-3), ("reinit_scope", "layer")),
    (("tau_quantile", 0.02), ("reinit_interval", 10)),
)
REINIT_TASKS = ("rte", "mrpc", "cola", "e2e")
TARGETS_TASKS = ("sst2", "stsb")


def _glue(
    name: str,
    title: str,
    metric: Metric,
    *,
    train: int,
    row_seconds: float,
    tuning: Size = _NO_ROWS,
    rates_of: str | None = None,
) -> Task:
    return Task(
        name=name,
        title=title,
        part="glue",
        base=ENCODER,
        kind="regression" if metric == "pearson_spearman" else "classification",
        metric=metric,
        size=Size(train, None, 2),
        tuning=tuning,
        batch=16,
        row_seconds=row_seconds,
        rates_of=rates_of,
    )


#: CoLA takes SST-2's rates, and MRPC and RTE, whose rows are pairs of texts, STS-B's. Of their few rows a tuning could
#: hold out some hundreds: among 300 the standard error of an accuracy of 70 is 2.6 points, more than a step of the rate
#: makes near the best one.
TASKS: tuple[Task, ...] = (
    _glue("sst2", "SST-2", "accuracy", train=1600, row_seconds=0.016, tuning=Size(800, 1000, 2)),
    _glue("mrpc", "MRPC", "accuracy_f1", train=1000, row_seconds=0.033, rates_of="stsb"),
    _glue("cola", "CoLA", "matthews", train=2000, row_seconds=0.014, rates_of="sst2"),
    _glue("rte", "RTE", "accuracy", train=600, row_seconds=0.044, rates_of="stsb"),
    _glue("stsb", "STS-B", "pearson_spearman", train=1000, row_seconds=0.022, tuning=Size(600, 500, 2)),
    Task(
        name="e2e",
        title="E2E NLG",
        part="e2e",
        base=WRITER,
        kind="completion",
        metric="bleu",
        size=Size(240, 120, 1),
        tuning=Size(120, 48, 1),
        batch=4,
        row_seconds=0.3,
        tuning_metric="loss",
    ),
    Task(
        name="chitchat",
        title="chitchat",
        part="chat",
        base=WRITER,
        kind="chat",
        metric="loss",
        size=Size(160, 80, 1),
        tuning=Size(80, 40, 1),
        batch=4,
        row_seconds=0.55,
        max_length=256,
    ),
    Task(
        name="fashion",
        title="Fashion-MNIST",
        part="images",
        base=VISION,
        kind="image-classification",
        metric="accuracy",
        size=Size(500, 500, 2),
        tuning=Size(400, 250, 1),
        batch=16,
        row_seconds=0.035,
    ),
)


@dataclass(frozen=True)
class Study:
    """Tasks and how much is done of each."""

    tasks: tuple[Task, ...] = TASKS
    #: Tasks whose rates are tuned; with the others every method takes its first rate. None for all.
    tuned: frozenset[str] | None = None

    @classmethod
    def smoke(cls) -> Study:
        """Every row of the study, once, on a handful of examples."""
        few = Size(8, 6, 1)
        tasks = tuple(replace(task, size=few, tuning=few, batch=4, seeds=(0,), max_length=48) for task in TASKS)
        return cls(tasks, frozenset({"sst2"}))

    def task(self, name: str) -> Task:
        """By its name."""
        return next(task for task in self.tasks if task.name == name)

    def in_part(self, part: Part) -> list[Task]:
        """Tasks whose main table is that of the part."""
        return [task for task in self.tasks if task.part == part]

    def configs(self, task: Task) -> list[Config]:
        """Rows of a task's main table."""
        if task.part == "e2e":
            compared = [Config(method, r, WRITER_TARGETS) for method in ("uora", "vera") for r in (8, 64, 256)]
            return [NONE, Config("lora", 8, WRITER_TARGETS), *compared]
        targets = WRITER_TARGETS if task.part == "chat" else GLUE_TARGETS
        five = [Config(method, DEFAULT_RANKS[method], targets) for method in METHODS]
        return [*five, NONE] if task.part == "chat" else [*five, Config("full"), HEAD, NONE]

    def wanted(self) -> list[tuple[Part, Task, Config]]:
        """Every configuration of every table, each under the part that asks for it first."""
        found = [(task.part, task, config) for task in self.tasks for config in self.configs(task)]
        for task in [task for task in self.tasks if task.name in REINIT_TASKS]:
            main = self.main(task)
            found += [("reinit", task, replace(main, settings=settings)) for settings in REINITIALISATIONS]
        for task in [task for task in self.tasks if task.name in TARGETS_TASKS]:
            found.append(("targets", task, self.wide(task)))
        return found

    def main(self, task: Task) -> Config:
        """UORA as a task's main table has it at its usual rank."""
        return next(each for each in self.configs(task) if (each.method, each.r) == ("uora", DEFAULT_RANKS["uora"]))

    def wide(self, task: Task) -> Config:
        """The same on all linear layers."""
        return replace(self.main(task), targets="all-linear")


@dataclass(frozen=True)
class Planned:
    """The runs that can be made now, and how many wait for a learning rate."""

    runs: list[Run]
    waiting: int


def plan(study: Study, lines: Lines) -> Planned:
    """All runs of the study, as far as the lines tell which learning rates they need."""
    tuner = _Tuner(study, lines)
    runs: list[Run] = []
    waiting = 0
    for part, task, config in study.wanted():
        seeds = task.seeds[:1] if config == NONE else task.seeds
        rate = tuner.rate(part, task, config.tuned)
        if rate is None:
            waiting += len(seeds)
        else:
            runs += [Run(part, task, config, "test", rate, seed, head_rate(task, config)) for seed in seeds]
    heads = [run for name in HEAD_TASKS for run in _heads(study.task(name), tuner)]
    return Planned(list({run.key: run for run in [*tuner.runs, *runs, *heads]}.values()), waiting)


def head_rate(task: Task, config: Config) -> float | None:
    """Of the head beside what is trained; None if there is none, or nothing else, or no training."""
    return HEAD_RATE if task.has_head and config not in (HEAD, NONE) else None


def _heads(task: Task, tuner: _Tuner) -> list[Run]:
    """What the rate of the head does; none until the rate is known beside which it is looked at."""
    main = tuner.study.main(task)
    rate = tuner.rate("glue", task, main)
    return [Run("glue", task, main, "head", rate, TUNING_SEED, each) for each in HEAD_RATES if rate is not None]


@dataclass
class _Tuner:
    """Rates as far as the lines tell them, each looked for once; ``runs`` are those that tell them."""

    study: Study
    lines: Lines
    runs: list[Run] = field(default_factory=list)
    _rates: dict[tuple[str, Config], float | None] = field(default_factory=dict)

    def rate(self, part: Part, task: Task, config: Config) -> float | None:
        """The best of a configuration, for the part that asks; None as long as a run is to be made for it."""
        tuned_on = self.study.task(task.rates_of or task.name)
        key = (tuned_on.name, config)
        if key not in self._rates:
            runs, self._rates[key] = tune(self.study, tuned_on, config, self.lines, part=part)
            self.runs += runs
        return self._rates[key]


def tune(study: Study, task: Task, config: Config, lines: Lines, *, part: Part) -> tuple[list[Run], float | None]:
    """The tuning runs of a configuration so far, and the best rate; None as long as one is to be made."""
    first = FIRST_RATES[config.method]
    if config == NONE or (study.tuned is not None and task.name not in study.tuned):
        return [], first

    def at(rate: float) -> Run:
        return Run(part, task, config, "tune", rate, TUNING_SEED, head_rate(task, config))

    low, high = -_FIRST_REACH, _FIRST_REACH
    while True:
        runs = [at(rung(first, step)) for step in range(low, high + 1)]
        best = _best(runs, lines, first)
        if best is None:
            return runs, None
        if best == 0 and low > -_LAST_REACH:
            low -= 1
        elif best == len(runs) - 1 and high < _LAST_REACH:
            high += 1
        else:
            break
    gaps = range(max(best - 1, 0), min(best + 1, len(runs) - 1))
    runs = sorted([*runs, *(at(between(runs[i].learning_rate)) for i in gaps)], key=lambda run: run.learning_rate)
    best = _best(runs, lines, first)
    return runs, None if best is None else runs[best].learning_rate


def _best(runs: Sequence[Run], lines: Lines, usual: float) -> int | None:
    """Place of the run with the best score; None if one has no line."""
    found = [line for run in runs if (line := lines.find(run.key)) is not None]
    if len(found) < len(runs):
        return None
    return best_of(runs[0].metric, found, usual=[run.learning_rate for run in runs].index(usual))


def best_of(metric: str, lines: Sequence[Line], *, usual: int) -> int:
    """Place of the best score; of equal ones the nearest to the ``usual`` rate's place."""
    sign = -1 if lower_is_better(metric) else 1
    return max(range(len(lines)), key=lambda i: (sign * lines[i].score, -abs(i - usual)))


def rung(first: float, steps: int) -> float:
    """The rate so many steps of a half decade (1, 3, 10, ...) away."""
    exponent = math.floor(math.log10(first) + 1e-9)
    place = 2 * exponent + (first / 10**exponent > 2) + steps
    return float(f"{3 if place % 2 else 1}e{place // 2}")


def between(low: float) -> float:
    """The rate between a rung and the next: 2 between 1 and 3, 5 between 3 and 10."""
    digit, exponent = f"{low:.0e}".split("e")
    return float(f"{2 if digit == '1' else 5}e{exponent}")
