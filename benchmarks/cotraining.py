"""Small jobs together against one after the other: ``python -m benchmarks.cotraining`` (``make bench-cotrain``).

Jobs of tenants are mostly small: some hundred rows, batches of one. A pass over one row leaves the machine half idle,
so jobs on one base model share their passes (``uora.training.cotraining``). Both sides train the same jobs on the same
rows of E2E, SmolLM2-135M-Instruct, batch 1, loading included, in one process and in turn; the claim is in
jobs per hour. A row has 67 tokens as a completion and 97 as chat, with the model's default system message. That the
adapters are the same is tested in float32 by tests/uora/training/test_cotraining.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import e2e
from benchmarks.training import CACHE, DTYPE, MODEL, Stopwatch, base_model
from uora.data import Dataset, Row, read_file
from uora.models import LocalModel
from uora.spec import Hyperparameters, TrainingSpec, UoraSpec
from uora.training import train
from uora.training.cotraining import Member, cotrain

RANK = 64
console = Console(width=120)


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    base = base_model(smoke=arguments.smoke)
    datasets, spec = _datasets(arguments), _spec(arguments.task)
    _together(base, datasets[:2], spec)  # frames and files are in the caches from here on
    seconds: dict[str, list[float]] = {"one after the other": [], "together": []}
    steps: dict[str, list[float]] = {name: [] for name in seconds}
    for repetition in range(arguments.repetitions):
        for name, run in (("one after the other", _one_by_one), ("together", _together)):
            console.print(f"repetition {repetition + 1} of {arguments.repetitions}: {name}", style="dim")
            begun = time.perf_counter()
            watches = run(base, datasets, spec)
            seconds[name].append(time.perf_counter() - begun)
            steps[name].append(statistics.median(lap for watch in watches for lap in watch.seconds[1:]))
    _show(seconds, steps, _operations(base, datasets, spec), arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, three jobs of three rows, once")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20, help="of each job; as many steps")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--task", choices=("completion", "chat"), default="completion")
    parser.add_argument("--data", type=Path, default=e2e.DEFAULT, help="the E2E challenge's devset.csv")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.jobs, arguments.rows, arguments.repetitions = 3, 3, 1
    return arguments


def _datasets(arguments: argparse.Namespace) -> list[Dataset[Row]]:
    """Every job's own rows."""
    rows = e2e.read_rows(arguments.data, arguments.jobs * arguments.rows, as_=arguments.task)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        return [
            read_file(e2e.write_jsonl(rows[job :: arguments.jobs], file), arguments.task)
            for job in range(arguments.jobs)
        ]


def _spec(task: e2e.Format) -> TrainingSpec:
    adapter = UoraSpec(r=RANK)
    return TrainingSpec(
        adapter=adapter,
        task=task,
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=1, learning_rate_multiplier=1.0),
        learning_rate=adapter.base_learning_rate,
        seed=0,
    )


def _one_by_one(base: LocalModel, datasets: Sequence[Dataset[Row]], spec: TrainingSpec) -> list[Stopwatch]:
    watches = [Stopwatch() for _ in datasets]
    for watch, dataset in zip(watches, datasets, strict=True):
        train(
            spec,
            base=base,
            training=dataset,
            validation=None,
            observer=watch,
            cache_dir=CACHE,
            dtype=DTYPE,
        )
    return watches


def _together(base: LocalModel, datasets: Sequence[Dataset[Row]], spec: TrainingSpec) -> list[Stopwatch]:
    watches = [Stopwatch() for _ in datasets]
    members = [Member(spec, dataset, None, watch) for watch, dataset in zip(watches, datasets, strict=True)]
    for result in cotrain(members, base=base, cache_dir=CACHE, dtype=DTYPE):
        if isinstance(result, Exception):
            raise result
    return watches


class _Counter(TorchDispatchMode):
    """Counts torch's operations that compute something: what a GPU would be told one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func._opname.startswith(("empty", "new_empty", "_unsafe_view")))
        return func(*args, **(kwargs or {}))


def _operations(base: LocalModel, datasets: Sequence[Dataset[Row]], spec: TrainingSpec) -> dict[str, int]:
    """Of one step, optimizer included: what a second and a third step add to a run, halved."""
    counts: dict[str, int] = {}
    for name, run, jobs in (("alone", _one_by_one, datasets[:1]), ("together", _together, datasets)):
        found = []
        for steps in (1, 3):
            with _Counter() as counter:
                run(base, [replace(dataset, rows=dataset.rows[:steps]) for dataset in jobs], spec)
            found.append(counter.count)
        counts[name] = (found[1] - found[0]) // 2
    return counts


def _show(
    seconds: dict[str, list[float]],
    steps: dict[str, list[float]],
    operations: dict[str, int],
    arguments: argparse.Namespace,
) -> None:
    jobs = arguments.jobs
    table = Table(
        title=f"{jobs} jobs of {arguments.rows} rows ({arguments.task}), batch 1, on {MODEL}, {DTYPE}, UORA r={RANK} "
        f"on all linear layers, loading included; {arguments.threads} threads of {os.cpu_count()} cores"
    )
    for column in ("", "s for all", "spread", "jobs per hour", "s per step of a job"):
        table.add_column(column, justify="right" if column else "left")
    per_step = {}
    for name, found in seconds.items():
        median = statistics.median(found)
        # Together, a step of every job is made in the time of one.
        per_step[name] = statistics.median(steps[name]) / (jobs if name == "together" else 1)
        spread = f"{min(found):.1f} to {max(found):.1f}"
        table.add_row(name, f"{median:.1f}", spread, f"{3600 * jobs / median:.0f}", f"{per_step[name]:.3f}")
    console.print(table)
    console.print(f"Medians of {arguments.repetitions} repetitions, in turn.")
    console.print(
        f"Operations of a step: {operations['alone']:,} for one job, {operations['together']:,} for {jobs} together."
    )
    one, all_ = (statistics.median(found) for found in seconds.values())
    result = {
        "cotrain_speedup": round(one / all_, 3),
        "step_speedup": round(per_step["one after the other"] / per_step["together"], 3),
        "jobs_per_hour_together": round(3600 * jobs / all_, 1),
        "jobs_per_hour_alone": round(3600 * jobs / one, 1),
        "jobs": jobs,
        "rows": arguments.rows,
        "task": arguments.task,
        "operations_alone": operations["alone"],
        "operations_together": operations["together"],
        "threads": arguments.threads,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
