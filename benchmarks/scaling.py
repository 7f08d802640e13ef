"""What a training step costs, and how well that is foretold: ``python -m benchmarks.scaling [--smoke] [--write]``.

UORA on SmolLM2-135M-Instruct, as a job of the service trains it, over ranks, targets, lengths of rows and
sizes of batches. The coefficients of ``uora.estimate`` are fitted to the measurements; each measurement is printed
beside what the coefficients fitted to all the others foretell (leave-one-out). ``--write`` puts them into the package.
Each measurement has a process of its own, and memory is its peak in the steps above that of one with only the base
model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from rich.table import Table

from benchmarks.training import CACHE, DTYPE, MODEL, SEED, Stopwatch, console, peak_mib
from uora import estimate
from uora.data import Example, fit, read_file
from uora.encoders import row_encoder
from uora.estimate import COSTS_FILE, Costs, Work
from uora.models import LocalModel, fetch, load_model
from uora.sizing import measure
from uora.spec import Hyperparameters, Targets, TrainingOptions, TrainingSpec, UoraSpec
from uora.training import train
from uora.training.batches import MAX_TOKENS_AT_ONCE

#: Each is one token, or nearly.
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "for",
    "on",
    "with",
    "as",
    "at",
    "by",
    "from",
    "it",
    "an",
    "be",
    "this",
    "that",
    "are",
    "was",
]


@dataclass(frozen=True)
class Setting:
    """One thing to measure; half of each row is learned unless said otherwise."""

    r: int
    targets: Targets
    length: int
    batch: int
    learned: float = 0.5


LAST_LAYERS: Targets = tuple(f"layers.{i}.{name}" for i in range(20, 30) for name in ("mlp.up_proj", "mlp.down_proj"))
SETTINGS = [
    Setting(8, "all-linear", 64, 2),
    Setting(64, "all-linear", 64, 2),
    Setting(256, "all-linear", 64, 2),
    Setting(8, "q,v", 64, 4),
    Setting(256, "q,v", 64, 4),
    Setting(64, LAST_LAYERS, 64, 4),
    Setting(8, "all-linear", 128, 4, learned=0.1),
    Setting(256, "all-linear", 128, 4, learned=0.9),
    Setting(64, "q,v", 128, 2, learned=0.9),
    Setting(64, "all-linear", 512, 1),
    Setting(64, "q,v", 32, 4, learned=0.1),
    Setting(64, "all-linear", 32, 8),
]
SMOKE = [Setting(8, "q,v", 16, 1), Setting(8, "q,v", 32, 1), Setting(16, "all-linear", 16, 2)]


@dataclass(frozen=True)
class Measurement:
    """What a step did and what it took."""

    setting: Setting
    work: Work
    seconds: float
    memory_bytes: float


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few tiny measurements")
    parser.add_argument("--steps", type=int, default=4, help="of a measurement; the first is not counted")
    parser.add_argument("--write", action="store_true", help=f"write uora/{COSTS_FILE}")
    arguments = parser.parse_args()
    base = fetch(MODEL, f"known:{MODEL}", cache_dir=CACHE)
    alone = _in_a_process(_resident_with_base, base)
    found = []
    for setting in SMOKE if arguments.smoke else SETTINGS:
        console.print(str(setting), style="dim")
        found.append(_in_a_process(_measure, base, setting, 2 if arguments.smoke else arguments.steps, alone))
    _show(found)
    if arguments.write:
        costs = fitted(found)
        content = {"machine": costs.machine, "seconds": costs.seconds, "memory": costs.memory}
        Path(estimate.__file__).with_name(COSTS_FILE).write_text(json.dumps(content, indent=2) + "\n")


# --- measuring


def _in_a_process(function: Callable[..., Any], *arguments: object) -> Any:
    """The function's answer from a process that ends with it, with all that it allocated."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _resident_with_base(base: LocalModel) -> float:
    kept = load_model(base, dtype=DTYPE, device="cpu")
    found = psutil.Process().memory_info().rss
    del kept
    return float(found)


def _measure(base: LocalModel, setting: Setting, steps: int, alone: float) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        rows = _write_rows(Path(folder) / "rows.jsonl", setting, steps)
        dataset = read_file(rows, "completion")
    watch = Stopwatch()
    spec = _spec(setting)
    train(
        spec,
        base=base,
        training=dataset,
        validation=None,
        observer=watch,
        cache_dir=CACHE,
        dtype=DTYPE,
    )
    peak = peak_mib() * 2**20
    encode = row_encoder("completion", base).encode
    examples = [_cut(encode(row), setting) for row in dataset.rows]
    tokens = sum(len(example.input_ids) for example in examples) / steps
    work = Work(
        sizes=measure(base, spec.adapter, "completion"),
        rank=setting.r,
        tokens=tokens,
        learned_tokens=sum(label != -100 for example in examples for label in example.labels) / steps,
        row_tokens=tokens / setting.batch,
        tokens_at_once=MAX_TOKENS_AT_ONCE["cpu"],
    )
    return Measurement(setting, work, statistics.median(watch.seconds[1:]), peak - alone)


def _write_rows(path: Path, setting: Setting, steps: int) -> Path:
    """Rows that are cut to the setting's length; they begin differently, so that none shares its beginning."""
    draw = np.random.default_rng(SEED).choice
    unlearned = round(setting.length * (1 - setting.learned))

    def row(number: int) -> dict[str, str]:
        prompt = [WORDS[number % len(WORDS)], *draw(WORDS, unlearned - 1)]
        return {"prompt": " ".join(prompt), "completion": " " + " ".join(draw(WORDS, setting.length))}

    rows = (row(number) for number in range(steps * setting.batch))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _spec(setting: Setting) -> TrainingSpec:
    adapter = UoraSpec(r=setting.r, targets=setting.targets)
    return TrainingSpec(
        adapter=adapter,
        task="completion",
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=setting.batch, learning_rate_multiplier=1.0),
        options=TrainingOptions(
            max_length=setting.length, overlong="truncate", save_steps=1000, gradient_checkpointing=False
        ),
        learning_rate=adapter.base_learning_rate,
        seed=SEED,
    )


def _cut(encoded: Example | int, setting: Setting) -> Example:
    cut = fit(cast(Example, encoded), max_length=setting.length, overlong="truncate")
    return cast(Example, cut)  # half of it is learned


# --- fitting


def fitted(found: Sequence[Measurement]) -> Costs:
    """The coefficients with the least squares of relative errors."""
    return Costs(
        machine=_machine(),
        seconds=_fit([item.work.seconds_terms() for item in found], [item.seconds for item in found]),
        memory=_fit([item.work.memory_terms() for item in found], [item.memory_bytes for item in found]),
    )


def _fit(terms: Sequence[Mapping[str, float]], targets: Sequence[float]) -> dict[str, float]:
    names = list(terms[0])
    matrix = np.array([[row[name] for name in names] for row in terms]) / np.array(targets)[:, None]
    scale = matrix.max(axis=0)
    solution = nonnegative_least_squares(matrix / scale, np.ones(len(targets))) / scale
    return dict(zip(names, solution.tolist(), strict=True))


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """``x >= 0`` with the smallest ``|matrix x - target|``: the best of all sets of columns whose ``x`` is positive."""
    best, least = np.zeros(matrix.shape[1]), float("inf")
    for chosen in range(1, 1 << matrix.shape[1]):
        columns = [i for i in range(matrix.shape[1]) if chosen >> i & 1]
        part = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
        error = float(np.sum((matrix[:, columns] @ part - target) ** 2))
        if part.min() >= 0 and error < least - 1e-12:
            best, least = np.zeros(matrix.shape[1]), error
            best[columns] = part
    return best


def _machine() -> str:
    models = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


# --- results


def _show(found: Sequence[Measurement]) -> None:
    table = Table("rank", "targets", "length", "batch", "learned", "s a step", "foretold", "MiB", "foretold")
    errors, memory_errors = [], []
    for index, item in enumerate(found):
        costs = fitted([*found[:index], *found[index + 1 :]])
        seconds, memory = costs.step_seconds(item.work), costs.memory_bytes(item.work)
        errors.append(abs(seconds / item.seconds - 1))
        memory_errors.append(abs(memory / item.memory_bytes - 1))
        setting = item.setting
        names = setting.targets if isinstance(setting.targets, str) else f"{len(setting.targets)} layers"
        table.add_row(
            *(f"{setting.r}", names, f"{setting.length}", f"{setting.batch}", f"{setting.learned:.0%}"),
            *(f"{item.seconds:.2f}", f"{seconds:.2f}", f"{item.memory_bytes / 2**20:.0f}", f"{memory / 2**20:.0f}"),
        )
    console.print(table)
    console.print("Relative errors of what is foretold, each from all the other measurements (leave-one-out):")
    result = {
        "median_error": round(statistics.median(errors), 3),
        "max_error": round(max(errors), 3),
        "memory_median_error": round(statistics.median(memory_errors), 3),
        "measurements": len(found),
        "machine": _machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
