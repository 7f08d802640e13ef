"""Five methods, one base model, one batch: ``python -m benchmarks.methods [--smoke]``.

Trains an adapter of each method for some steps on the real SmolLM2-135M-Instruct and real reviews, stores all five as
rows of a database, loads them from there into one bank, and generates with one batch that mixes all five and the bare
base model. Its claim: every answer of the mixed batch is, token by token, the one that its owner gives when it is
served alone. Serving is in float32, where no rounding can turn a near tie of two tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from api.database import make_engine, make_sessions
from api.models.models import Adapter
from api.projects.service import ensure_project
from api.settings import Settings
from benchmarks.training import base_model
from scripts.demo_data import Review, load_split, write_jsonl
from uora.artifact import Artifact, loads, stored_bytes
from uora.data import read_file, render
from uora.models import LocalModel, load_model, load_tokenizer, pick_dtype
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Delta, Generation
from uora.serving.sampling import Sampling
from uora.spec import METHODS, Hyperparameters, LoraSpec, TrainingSpec, parse_adapter
from uora.svd import BaseWeights
from uora.training import Evaluation, StepMetrics, train
from worker.engine.adapters import AdapterStore
from worker.up import migrate

MODEL = "SmolLM2-135M-Instruct"
BATCH = 8
console = Console()


@dataclass
class Watch:
    """A ``TrainingObserver`` that keeps the losses and the time of every step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _begun: float = 0.0

    def on_start(self, total_steps: int) -> None:
        """Start the first step's clock."""
        self._begun = time.perf_counter()

    def on_step(self, metrics: StepMetrics) -> None:
        """Keep the step."""
        now = time.perf_counter()
        self.losses.append(metrics.train_loss)
        self.seconds.append(now - self._begun)
        self._begun = now

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Nothing to keep: the result holds the adapter."""

    def on_state(self, step: int, state: bytes) -> None:
        """Nothing to keep: nobody stops this."""

    def should_stop(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Trained:
    """An adapter as it came out of the training."""

    artifact: bytes
    watch: Watch


def main() -> None:
    """Run the benchmark; exit with 1 if an answer of the mixed batch differs."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="uora-methods-") as folder:
        home = Path(folder)
        database_url = os.environ.get("UORA_DATABASE_URL", f"sqlite:///{home}/rows.db")
        settings = Settings(home=home, database_url=database_url, engine_token=secrets.token_urlsafe())
        split = load_split(settings.cache_dir, train=arguments.steps * BATCH, validation=0, held_out=arguments.prompts)
        base = base_model(smoke=arguments.smoke)
        trained = {method: _train(method, arguments, split.train, base, settings) for method in METHODS}
        rows = _store(settings, trained)
        result = _serve(settings, base, rows, split.held_out, max_tokens=arguments.tokens)
    _show(trained, result, arguments)
    sys.exit(0 if result["mixed_equals_alone"] else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, 2 steps on query and value, a few tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--prompts", type=int, default=4, help="held-out reviews, each asked of every model")
    parser.add_argument("--tokens", type=int, default=24, help="to generate at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.targets, arguments.prompts, arguments.tokens = 2, "q,v", 1, 8
    return arguments


def _train(
    method: str, arguments: argparse.Namespace, reviews: Sequence[Review], base: LocalModel, settings: Settings
) -> Trained:
    adapter = parse_adapter({"method": method, "targets": arguments.targets})
    spec = TrainingSpec(
        adapter=adapter,
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=BATCH, learning_rate_multiplier=1.0),
        learning_rate=adapter.base_learning_rate,
        seed=0,
    )
    watch = Watch()
    console.print(f"training {method}, {arguments.steps} steps of {BATCH} rows")
    result = train(
        spec,
        base=base,
        training=read_file(write_jsonl(list(reviews), settings.home / "train.jsonl"), "chat"),
        validation=None,
        observer=watch,
        cache_dir=settings.cache_dir,
        dtype=pick_dtype("auto"),
    )
    return Trained(result.artifact, watch)


def _store(settings: Settings, trained: dict[str, Trained]) -> list[Adapter]:
    """One row per adapter, in one transaction."""
    migrate(settings)
    with make_sessions(make_engine(settings.database_url)).begin() as session:
        project = ensure_project(session, name="benchmark")
        rows = [_row(method, project.id, loads(item.artifact), item.artifact) for method, item in trained.items()]
        session.add_all(rows)
    return rows


def _row(method: str, project_id: str, artifact: Artifact, stored: bytes) -> Adapter:
    return Adapter(
        id=f"ft:{MODEL}:benchmark:{method}:{artifact.manifest.digest[:8]}",
        project_id=project_id,
        base_model=MODEL,
        digest=artifact.manifest.digest,
        manifest=artifact.manifest.model_dump(mode="json"),
        artifact=stored,
    )


def _serve(
    settings: Settings, base: LocalModel, rows: list[Adapter], reviews: Sequence[Review], *, max_tokens: int
) -> dict[str, Any]:
    store = AdapterStore(make_sessions(make_engine(settings.database_url)))
    tokenizer = cast(PreTrainedTokenizerFast, load_tokenizer(base))
    model = load_model(base, dtype=torch.float32, device="cpu")
    weights = BaseWeights.of_local(base, "chat", settings.cache_dir)
    bank = AdapterBank(model, base_digest=base.digest, weights=weights)
    for row in rows:
        artifact = store.load(row.id, row.digest)
        bank.check(artifact.manifest)
        bank.put(artifact)
    owners: list[str | None] = [*(row.digest for row in rows), None]
    prompts = [render(tokenizer, review.prompt(), add_generation_prompt=True) for review in reviews]
    requests = [(owner, prompt) for prompt in prompts for owner in owners]
    batcher = Batcher(model, tokenizer, bank, max_rows=len(requests))

    begun = time.perf_counter()
    mixed = _generate(batcher, requests, max_tokens)
    seconds_mixed = time.perf_counter() - begun
    begun = time.perf_counter()
    alone = [_generate(batcher, [request], max_tokens)[0] for request in requests]
    seconds_alone = time.perf_counter() - begun
    return {
        "mixed_equals_alone": mixed == alone,
        "answers": len(requests),
        "different_answers": len({tuple(answer) for answer in mixed}),
        "seconds_mixed": round(seconds_mixed, 2),
        "seconds_alone": round(seconds_alone, 2),
        "tokens": sum(len(answer) for answer in mixed),
    }


def _generate(batcher: Batcher, requests: Sequence[tuple[str | None, list[int]]], max_tokens: int) -> list[list[int]]:
    """Greedy token ids of every request, all in one batch."""

    def raise_error(item: Delta | Exception) -> None:
        if isinstance(item, Exception):
            raise item

    generations = [
        Generation(
            prompt=prompt,
            adapter=owner,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0),
            emit=raise_error,
        )
        for owner, prompt in requests
    ]
    batcher.join(generations)
    while batcher.running:
        batcher.step()
    return [generation.generated for generation in generations]


def _show(trained: dict[str, Trained], result: dict[str, Any], arguments: argparse.Namespace) -> None:
    table = Table(title=f"{MODEL}, {arguments.targets}, {arguments.steps} steps of {BATCH} rows")
    for name in ("method", "rank", "trained numbers", "stored bytes", "LoRA r=8 is larger by", "s per step", "loss"):
        table.add_column(name, justify="left" if name == "method" else "right")
    methods = {}
    for method, item in trained.items():
        manifest = loads(item.artifact).manifest
        size, lora = len(item.artifact), stored_bytes(LoraSpec(r=8), manifest.modules)
        losses = item.watch.losses
        methods[method] = {
            "r": manifest.adapter.r,
            "trainable_parameters": manifest.trainable_parameters,
            "stored_bytes": size,
            "lora8_ratio": round(lora / size, 2),
            "seconds_per_step": round(statistics.median(item.watch.seconds), 3),
            "first_loss": round(losses[0], 4),
            "last_loss": round(losses[-1], 4),
        }
        table.add_row(
            method,
            f"{manifest.adapter.r}",
            f"{manifest.trainable_parameters:,}",
            f"{size:,}",
            f"{lora / size:.2f} x",
            f"{statistics.median(item.watch.seconds):.2f}",
            f"{losses[0]:.3f} to {losses[-1]:.3f}",
        )
    console.print(table)
    console.print(
        f"{result['answers']} answers in one mixed batch: {result['seconds_mixed']} s; one at a time: "
        f"{result['seconds_alone']} s. Equal: {result['mixed_equals_alone']}. Medians; {arguments.threads} threads."
    )
    console.print_json(json.dumps({"methods": methods, **result, "threads": arguments.threads}), indent=None)


if __name__ == "__main__":
    main()
