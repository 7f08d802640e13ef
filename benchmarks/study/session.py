"""Making the runs that have no line yet: one after the other, or together where a training can be shared."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.study import data
from benchmarks.study.bases import DTYPE
from benchmarks.study.jobs import Job, Outcome
from benchmarks.study.lines import Line, Lines
from benchmarks.study.plan import NONE, Planned, Run, Study, plan
from benchmarks.study.running import Runner
from uora.spec import METHODS, cotraining_key

#: Runs in one training at most: the seeds of a final result, or the first rates of a ladder.
TOGETHER = 3


@dataclass
class Session:
    """A study with its lines and what makes them."""

    study: Study
    lines: Lines
    runner: Runner
    #: Rows of a task, of the final runs and of the others.
    _splits: dict[tuple[str, bool], data.Split] = field(default_factory=dict)

    def plan(self, only: frozenset[str]) -> Planned:
        """Runs without a line, of these parts or purposes; all if none is named."""
        planned = plan(self.study, self.lines)
        missing = [run for run in planned.runs if self.lines.find(run.key) is None]
        return Planned([run for run in missing if not only or only & {run.part, run.purpose}], planned.waiting)

    def first_of(self, runs: Sequence[Run]) -> list[Run]:
        """The first, and those whose training it can share: of the same adapter with other seeds or other rates."""
        first = runs[0]
        if first.config.method not in METHODS or cotraining_key(self._job(first).training_spec()) is None:
            return [first]
        shared = (first.task, first.config, first.purpose)
        return [run for run in runs if (run.task, run.config, run.purpose) == shared][:TOGETHER]

    def make(self, runs: Sequence[Run]) -> list[Line]:
        """Run one, or several of one training (`first_of`); their lines, in the same order."""
        begun = time.perf_counter()
        jobs = [self._job(run) for run in runs]
        outcomes = [self.runner.run(jobs[0])] if len(jobs) == 1 else self.runner.run_together(jobs)
        spent = (time.perf_counter() - begun) / len(runs)
        return [self._line(*each, spent, len(runs)) for each in zip(runs, jobs, outcomes, strict=True)]

    def _job(self, run: Run) -> Job:
        split, size = self._split(run), run.size
        return Job(run.task, run.config, split, run.metric, run.learning_rate, size.epochs, run.seed, run.head_rate)

    def _line(self, run: Run, job: Job, outcome: Outcome, spent: float, together: int) -> Line:
        return Line(
            key=run.key,
            part=run.part,
            task=run.task.name,
            base=run.task.base,
            method=run.config.method,
            r=run.config.r,
            targets=run.config.targets,
            settings=dict(run.config.settings),
            purpose=run.purpose,
            seed=run.seed,
            learning_rate=run.learning_rate,
            head_learning_rate=run.head_rate,
            epochs=run.size.epochs,
            batch=run.task.batch,
            rows=len(job.split.train),
            test_rows=len(job.split.test),
            metric=run.metric,
            score=round(outcome.scores[run.metric], 4),
            scores={name: round(score, 4) for name, score in outcome.scores.items()},
            trainable_parameters=outcome.trainable_parameters,
            head_parameters=outcome.head_parameters,
            stored_bytes=outcome.stored_bytes,
            seconds=round(outcome.seconds, 2),
            total_seconds=round(spent, 2),
            together=together,
            tokens=outcome.tokens,
            steps=outcome.steps,
            hits=outcome.hits,
            dtype=str(DTYPE).removeprefix("torch."),
            threads=torch.get_num_threads(),
            machine=machine(),
            command=f"python -m benchmarks.quality --threads {torch.get_num_threads()} --run {shlex.quote(run.key)}",
        )

    def _split(self, run: Run) -> data.Split:
        places, size, final = self.runner.bases.places, run.size, run.purpose == "test"
        if (run.task.name, final) not in self._splits:
            self._splits[run.task.name, final] = (
                data.final_split(run.task.name, places, train=size.train, test=size.test)
                if final
                else data.tune_split(run.task.name, places, train=size.train, held_out=size.test or 0)
            )
        return self._splits[run.task.name, final]


def estimated_seconds(run: Run, lines: Lines) -> float:
    """Of the same task and method if there is a line, of the same task if not, else as measured once."""
    rows = run.size.train * run.size.epochs
    same_task = [line for line in lines.all() if line.task == run.task.name and line.tokens + line.steps]
    same = [line for line in same_task if line.method == run.config.method] or same_task
    if run.config == NONE and run.task.has_head:
        return 0.0
    if not same or run.config == NONE:
        return run.task.row_seconds * rows
    return statistics.median(line.total_seconds / (line.rows * line.epochs) for line in same) * rows


def machine() -> str:
    """The processor and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
