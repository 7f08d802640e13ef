"""A training step against stock PEFT's: ``python -m benchmarks.training [--smoke]`` (``make bench-train``).

The same model (SmolLM2-135M-Instruct), the same rows (E2E as chat, learned on the answers) in the same order
and batches of 8, through two trainers: ours, as a job of the service runs it, and transformers' Trainer with a stock
PEFT adapter and transformers' own padding collator. Contestants take turns, so that a slow minute hits all of them;
medians are over all steps but each run's first. Peak memory is measured in a process of its own for each, above what
the same process needs with only the base model loaded.

The floor is what no adapter can go below: the same packed rows through the frozen base model and the gradient back to
its embeddings.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import psutil
import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks import e2e
from uora.data import ChatRow, Dataset, Example, Row, encode_chat, read_file
from uora.models import LocalModel, fetch, load_model, load_tokenizer, pick_dtype
from uora.spec import Hyperparameters, TrainingOptions, TrainingSpec, UoraSpec
from uora.training import Evaluation, StepMetrics, train
from uora.training.batches import MAX_TOKENS_AT_ONCE
from uora.training.loss import predicting_positions
from uora.training.packing import make_packer

MODEL = "SmolLM2-135M-Instruct"
#: bfloat16 where the processor computes in it.
DTYPE = pick_dtype("auto")
SEED = 0
CACHE = Path(os.environ.get("UORA_CACHE_DIR", Path.home() / ".cache" / "uora"))
console = Console(width=150)


@dataclass
class Stopwatch:
    """Seconds of every step, from the end of the one before; peak memory from the first on."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    _last: float = 0.0

    def start(self) -> None:
        """The first step begins."""
        reset_peak()
        self._last = time.perf_counter()

    def lap(self, loss: float) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.losses.append(loss)
        self._last = now

    # A TrainingObserver of ours:

    def on_start(self, total_steps: int) -> None:
        """Everything is loaded."""
        self.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        self.lap(metrics.train_loss)
        self.tokens = metrics.trained_tokens

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Comes after the last step."""

    def on_state(self, step: int, state: bytes) -> None:
        """Nothing to keep."""

    def should_stop(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Workload:
    """What all contestants train on."""

    base: LocalModel
    dataset: Dataset[Row]
    examples: list[Example]
    batch: int

    @classmethod
    def read(cls, base: LocalModel, path: Path, *, steps: int, batch: int) -> Workload:
        """Enough rows for ``steps`` steps."""
        with tempfile.TemporaryDirectory() as folder:
            rows = e2e.read_rows(path, steps * batch)
            dataset = read_file(e2e.write_jsonl(rows, Path(folder) / "rows.jsonl"), "chat")
        tokenizer = load_tokenizer(base)
        return cls(base, dataset, [encode_chat(cast(ChatRow, row), tokenizer) for row in dataset.rows], batch)


def base_model(*, smoke: bool) -> LocalModel:
    """What is trained: in the short form, which is there to see that all of it runs, a random model of two layers."""
    if not smoke:
        return fetch(MODEL, f"known:{MODEL}", cache_dir=CACHE)
    from tests.tiny import make_tiny_llama

    folder = tempfile.mkdtemp(prefix="uora-bench-")
    atexit.register(shutil.rmtree, folder)
    return fetch("tiny", f"path:{make_tiny_llama(Path(folder) / 'tiny', max_tokens=1024)}", cache_dir=CACHE)


Contestant = Callable[[Workload], Stopwatch]


def ours(r: int, *, packing: bool = True) -> Contestant:
    """UORA on all linear layers, as a job of the service trains it."""

    def run(work: Workload) -> Stopwatch:
        adapter = UoraSpec(r=r)
        spec = TrainingSpec(
            adapter=adapter,
            hyperparameters=Hyperparameters(n_epochs=1, batch_size=work.batch, learning_rate_multiplier=1.0),
            options=TrainingOptions(packing=packing, save_steps=1000),
            learning_rate=adapter.base_learning_rate,
            seed=SEED,
        )
        watch = Stopwatch()
        train(
            spec,
            base=work.base,
            training=work.dataset,
            validation=None,
            observer=watch,
            cache_dir=CACHE,
            dtype=DTYPE,
        )
        return watch

    return run


def without_shared_prefix(contestant: Contestant) -> Contestant:
    """The same with every row's beginning computed for itself."""

    def run(work: Workload) -> Stopwatch:
        with patch("uora.training.packing.shared_prefix", lambda _: 0):
            return contestant(work)

    return run


class _Laps(TrainerCallback):
    """Keeps the time of transformers' Trainer."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._watch.lap(float("nan"))


def stock(config: Callable[[], PeftConfig], learning_rate: float) -> Contestant:
    """A PEFT adapter on all linear layers under transformers' Trainer with its own padding collator."""

    def run(work: Workload) -> Stopwatch:
        torch.manual_seed(SEED)
        base = load_model(work.base, dtype=DTYPE, device=_device())
        model = get_peft_model(base, config())
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=cast(Any, model),
                args=TrainingArguments(
                    output_dir=folder,
                    num_train_epochs=1,
                    per_device_train_batch_size=work.batch,
                    learning_rate=learning_rate,
                    seed=SEED,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=_device() == "cpu",
                    bf16=False,
                    include_num_input_tokens_seen="non_padding",
                ),
                train_dataset=cast(Any, [_features(example) for example in work.examples]),
                data_collator=DataCollatorForSeq2Seq(load_tokenizer(work.base), padding=True),
                callbacks=[_Laps(watch)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        watch.tokens = trainer.state.num_input_tokens_seen
        return watch

    return run


def _features(example: Example) -> dict[str, list[int]]:
    ids = example.input_ids
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": example.labels}


def floor(work: Workload) -> Stopwatch:
    """The frozen base model on the packed rows, forward and back to its embeddings."""
    model = load_model(work.base, dtype=DTYPE, device=_device()).train()
    packer = make_packer(model)
    if packer is None:
        sys.exit(f"{MODEL} cannot be packed; the table would compare other things than it says.")
    embed = model.get_input_embeddings()
    watch = Stopwatch()
    watch.start()
    for start in range(0, len(work.examples), work.batch):
        rows = work.examples[start : start + work.batch]
        total = 0.0
        for piece in packer.pieces(rows, max_tokens=MAX_TOKENS_AT_ONCE[_device()]):
            labels = piece.pop("labels").to(_device())
            embeddings = embed(piece.pop("input_ids").to(_device())).detach().requires_grad_()
            positions = piece.pop("position_ids").to(_device())
            logits = model(
                inputs_embeds=embeddings,
                position_ids=positions,
                logits_to_keep=predicting_positions(labels),
                use_cache=False,
                **piece,
            ).logits
            loss = F.cross_entropy(logits.float().flatten(0, -2), labels[:, 1:][labels[:, 1:] != -100])
            loss.backward()
            total += loss.item()
        watch.lap(total)
        watch.tokens += sum(len(row.input_ids) for row in rows)
    return watch


def base_only(work: Workload) -> Stopwatch:
    """The base model loaded, and nothing done with it."""
    watch = Stopwatch()
    model = load_model(work.base, dtype=DTYPE, device=_device())
    watch.start()
    del model
    return watch


#: By the names of the table's rows; peers at the learning rates of PEFT's own examples, which do not matter for time.
CONTESTANTS: dict[str, Contestant] = {
    "ours: uora r=64": ours(64),
    "ours: uora r=256": ours(256),
    "peft: lora r=8": stock(lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), 1e-3),
    "peft: vera r=64": stock(lambda: VeraConfig(r=64, target_modules="all-linear"), 1e-2),
    "peft: vera r=256": stock(lambda: VeraConfig(r=256, target_modules="all-linear"), 1e-2),
    "floor: no adapter": floor,
    "ours: uora r=64, packed, no shared prefix": without_shared_prefix(ours(64)),
    "ours: uora r=256, packed, no shared prefix": without_shared_prefix(ours(256)),
    "ours: uora r=64, padded": ours(64, packing=False),
}
BASE_ONLY = "base model only"
OURS = "ours: uora r=64"
REFERENCE = "peft: lora r=8"


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        _measure_memory(arguments)
        return
    base = base_model(smoke=arguments.smoke)
    work = Workload.read(base, arguments.data, steps=arguments.steps, batch=arguments.batch)
    watches: dict[str, list[Stopwatch]] = {name: [] for name in CONTESTANTS}
    for repetition in range(arguments.repetitions):
        for name, contestant in CONTESTANTS.items():
            console.print(f"repetition {repetition + 1} of {arguments.repetitions}: {name}", style="dim")
            watches[name].append(contestant(work))
    measured = (OURS, REFERENCE) if arguments.smoke else tuple(CONTESTANTS)
    memory = {name: _memory_in_its_own_process(name, arguments) for name in (BASE_ONLY, *measured)}
    _show(work, watches, memory, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one repetition of two steps of two rows")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a repetition; the first is not counted")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", type=Path, default=e2e.DEFAULT, help="the E2E challenge's devset.csv")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.repetitions, arguments.steps, arguments.batch = 1, 2, 2
    return arguments


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- memory: of the process, and of the GPU where there is one


def reset_peak() -> None:
    """Forget the peak so far (Linux: the kernel's own mark of the process)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak since then: GPU memory where there is one, else the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**10


def _measure_memory(arguments: argparse.Namespace) -> None:
    base = base_model(smoke=arguments.smoke)
    work = Workload.read(base, arguments.data, steps=arguments.steps, batch=arguments.batch)
    if arguments.memory_of == BASE_ONLY:
        kept = load_model(work.base, dtype=DTYPE, device=_device())
        found = torch.cuda.memory_allocated() if _device() == "cuda" else psutil.Process().memory_info().rss
        del kept
        print(found / 2**20)
        return
    CONTESTANTS[arguments.memory_of](work)
    print(peak_mib())


def _memory_in_its_own_process(name: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.training", "--memory-of", name]
    command += ["--steps", "2", "--batch", str(arguments.batch), "--threads", str(arguments.threads)]
    command += ["--data", str(arguments.data), *(["--smoke"] if arguments.smoke else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


# --- results


def _show(
    work: Workload, watches: dict[str, list[Stopwatch]], memory: dict[str, float], arguments: argparse.Namespace
) -> None:
    seconds = {name: statistics.median(_counted(runs)) for name, runs in watches.items()}
    above = {name: memory.get(name, math.nan) - memory[BASE_ONLY] for name in watches}
    tokens = {name: runs[0].tokens for name, runs in watches.items()}
    if len(set(tokens.values())) != 1:
        sys.exit(f"The contestants did not train the same tokens: {tokens}")
    (per_run,) = set(tokens.values())
    learned = sum(label != -100 for example in work.examples for label in example.labels)
    table = Table(
        title=f"{MODEL}, {DTYPE}, E2E as chat, batch {arguments.batch}: "
        f"{per_run / arguments.steps:.0f} tokens a step, "
        f"{learned / per_run:.0%} of them learned; {arguments.threads} threads of {os.cpu_count()} cores",
    )
    for column in (
        "",
        "s per step",
        "spread",
        "tokens/s",
        "of lora r=8",
        "of the floor",
        "MiB above base",
        "of lora r=8",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, runs in watches.items():
        counted = _counted(runs)
        table.add_row(
            name,
            f"{seconds[name]:.3f}",
            f"{min(counted):.2f} to {max(counted):.2f}",
            f"{per_run / arguments.steps / seconds[name]:.0f}",
            f"{seconds[name] / seconds[REFERENCE]:.2f}",
            f"{seconds[name] / seconds['floor: no adapter']:.2f}",
            f"{above[name]:.0f}",
            f"{above[name] / above[REFERENCE]:.2f}",
        )
    console.print(table)
    console.print(f"Medians of {len(_counted(watches[REFERENCE]))} steps each, contestants taking turns.")

    def ratio(one: str, other: str) -> float:
        return round(seconds[one] / seconds[other], 3)

    result = {
        "uora64_vs_lora8": ratio("ours: uora r=64", "peft: lora r=8"),
        "uora256_vs_vera256": ratio("ours: uora r=256", "peft: vera r=256"),
        "uora64_vs_vera64": ratio("ours: uora r=64", "peft: vera r=64"),
        "uora64_vs_floor": ratio("ours: uora r=64", "floor: no adapter"),
        "memory_vs_lora8": round(above["ours: uora r=64"] / above[REFERENCE], 3),
        "uora64_unshared_vs_lora8": ratio("ours: uora r=64, packed, no shared prefix", "peft: lora r=8"),
        "uora256_unshared_vs_vera256": ratio("ours: uora r=256, packed, no shared prefix", "peft: vera r=256"),
        "tokens_per_step": round(per_run / arguments.steps, 1),
        "repetitions": arguments.repetitions,
        "threads": arguments.threads,
        "cores": os.cpu_count(),
        "device": _device(),
    }
    print(json.dumps(result))


def _counted(runs: Sequence[Stopwatch]) -> list[float]:
    """Every step's seconds but each run's first, which warms up."""
    return [seconds for run in runs for seconds in run.seconds[1:]]


if __name__ == "__main__":
    main()
