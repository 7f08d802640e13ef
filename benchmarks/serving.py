"""Thousands of adapters on one base model: ``python -m benchmarks.serving`` (``make bench-serve``).

SmolLM2-135M-Instruct in bfloat16 (in float32 where the processor has none, as the engine), 32 streams at once, prompts
of 32 to 128 tokens, 64 new tokens each, greedy. The engine's batch (``uora.serving``) answers the same prompts by its
base model and by 1, 32, 1,000 and 10,000 distinct adapters (UORA on q and v, r = 64), with hits, so that both frames
take part, and without. Peers in the same process and turn by turn: plain ``generate`` of the bare base model, and stock
PEFT with 32 LoRAs of r = 8 and ``adapter_names``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import api.files.models
import api.jobs.models  # noqa: F401 - the mappers need every table
from api.database import Base, make_engine, make_sessions, new_id
from api.models.models import Adapter
from api.projects.models import Project
from benchmarks.training import CACHE, MODEL, base_model
from uora import targets
from uora.artifact import Artifact, Manifest, Provenance, dumps, loads
from uora.layout import ModuleShape
from uora.methods import adapter_fingerprint
from uora.models import LocalModel, load_model, load_tokenizer, pick_dtype
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Delta, Generation
from uora.serving.sampling import Sampling
from uora.spec import UoraSpec
from uora.svd import BaseWeights
from worker.engine.adapters import AdapterStore

RANK = 64
LORA_RANK = 8
console = Console(width=120)


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench = Bench(arguments)
    rates: dict[str, list[float]] = {name: [] for name, _ in bench.contestants()}
    for repetition in range(arguments.repetitions):
        for name, run in bench.contestants():
            rates[name].append(run())
            console.print(f"repetition {repetition + 1}: {name}: {rates[name][-1]:.0f} tokens/s", style="dim")
    bench.show(rates, latencies(bench))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, one repetition with few adapters and tokens"
    )
    parser.add_argument("--adapters", type=int, default=10_000, help="the largest number")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="of each contestant and repetition")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: as the engine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.adapters, arguments.streams, arguments.requests, arguments.repetitions = 40, 4, 6, 1
        arguments.tokens = 6
    return arguments


class Bench:
    """The engine with its adapters, the peers, and what they are asked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.dtype = pick_dtype(arguments.dtype)
        self.base = base_model(smoke=arguments.smoke)
        tokenizer = cast(PreTrainedTokenizerFast, load_tokenizer(self.base))
        self.plain = self._load()
        self.modules = tuple(targets.find(self.plain, "q,v").values())
        self.lora = _mixed_lora(self._load(), arguments.streams)
        served = self._load()
        self.bank = AdapterBank(
            served, base_digest=self.base.digest, weights=BaseWeights.of_local(self.base, "chat", CACHE)
        )
        self.batcher = Batcher(served, tokenizer, self.bank, max_rows=arguments.streams)
        self.batcher._end_tokens = frozenset()  # every answer has all its tokens, as the peers' have
        draw = np.random.default_rng(0)
        self.prompts: list[list[int]] = [
            draw.integers(5, min(49_000, len(tokenizer)), size=draw.integers(32, 129)).tolist()
            for _ in range(arguments.requests)
        ]
        self.bytes: dict[str, int] = {}
        self.digests = {hits: self._fill(hits=hits) for hits in (True, False)}
        self.first_tokens: list[float] = []

    def _load(self) -> PreTrainedModel:
        return load_model(self.base, dtype=self.dtype, device=self.arguments.device)

    def _fill(self, *, hits: bool) -> list[str]:
        """Make all adapters of one kind resident."""
        process = psutil.Process()
        resident, whole = self.bank.bytes, process.memory_info().rss
        found = []
        for artifact in artifacts(self.base, self.modules, self.arguments.adapters, hits=hits):
            self.bank.put(artifact)
            found.append(artifact.manifest.digest)
        name = "with hits" if hits else "without hits"
        self.bytes[name] = self.bank.bytes - resident
        self.bytes[f"{name}, of the process"] = process.memory_info().rss - whole
        return found

    def sizes(self) -> list[int]:
        """Numbers of distinct adapters that are compared."""
        return [size for size in (1, 32, 1_000) if size < self.arguments.adapters] + [self.arguments.adapters]

    def contestants(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Names with what measures their tokens per second."""
        yield "base model", lambda: self.serve([None] * len(self.prompts))
        for hits in (True, False):
            for size in self.sizes():
                name = f"{size:,} adapters{'' if hits else ', no hits'}"
                yield name, lambda hits=hits, size=size: self.serve(self._uniform(size, hits=hits))  # type: ignore[misc]
        yield "zipf", lambda: self.serve(self._zipf())
        yield "generate", self._generate
        yield "peft", self._peft

    def _uniform(self, size: int, *, hits: bool) -> list[str]:
        drawn = np.random.default_rng(size).integers(size, size=len(self.prompts))
        return [self.digests[hits][number] for number in drawn]

    def _zipf(self) -> list[str]:
        weights = 1 / np.arange(1, self.arguments.adapters + 1)
        drawn = np.random.default_rng(0).choice(len(weights), len(self.prompts), p=weights / weights.sum())
        return [self.digests[True][number] for number in drawn]

    def serve(self, adapters: Sequence[str | None]) -> float:
        """Tokens per second of our engine: as one stream ends, the next request begins."""
        begun: dict[int, float] = {}
        first: dict[int, float] = {}

        def emitter(number: int) -> Callable[[Delta | Exception], None]:
            def emit(item: Delta | Exception) -> None:
                if isinstance(item, Exception):
                    raise item
                first.setdefault(number, time.perf_counter())

            return emit

        waiting = [
            Generation(prompt, adapter, self.arguments.tokens, Sampling(temperature=0.0), emitter(number))
            for number, (prompt, adapter) in enumerate(zip(self.prompts, adapters, strict=True))
        ][::-1]
        generations = list(waiting)
        start = time.perf_counter()
        while waiting or self.batcher.running:
            while waiting and self.batcher.free_rows:
                begun[len(generations) - len(waiting)] = time.perf_counter()
                self.batcher.join([waiting.pop()])
            self.batcher.step()
        seconds = time.perf_counter() - start
        self.first_tokens = [first[number] - begun[number] for number in begun]
        return sum(len(generation.generated) for generation in generations) / seconds

    def _generate(self) -> float:
        return self._stock(self.plain, len(self.prompts))

    def _peft(self) -> float:
        """One batch: PEFT's mixed batches are a matter of minutes."""
        names = [f"adapter{row}" for row in range(self.arguments.streams)]
        return self._stock(self.lora, self.arguments.streams, adapter_names=names)

    @torch.inference_mode()
    def _stock(self, model: Any, requests: int, **options: Any) -> float:
        """Tokens per second of ``generate``, which takes one batch after the other."""
        seconds = 0.0
        for at in range(0, requests, self.arguments.streams):
            prompts = self.prompts[at : at + self.arguments.streams]
            batch = {name: tensor.to(self.arguments.device) for name, tensor in _padded(prompts).items()}
            chosen = {name: value[: len(prompts)] for name, value in options.items()}
            start = time.perf_counter()
            model.generate(**batch, **chosen, **self._exactly())
            seconds += time.perf_counter() - start
        return requests * self.arguments.tokens / seconds

    def _exactly(self) -> dict[str, Any]:
        tokens = self.arguments.tokens
        return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def one_stream(self) -> tuple[float, float]:
        """Seconds for one answer, nothing else running: ours by an adapter, and ``generate`` of the base model."""
        prompt = self.prompts[0]
        generation = Generation(
            prompt, self.digests[True][0], self.arguments.tokens, Sampling(temperature=0.0), lambda _: None
        )
        start = time.perf_counter()
        self.batcher.join([generation])
        while self.batcher.running:
            self.batcher.step()
        ours = time.perf_counter() - start
        batch = {name: tensor.to(self.arguments.device) for name, tensor in _padded([prompt]).items()}
        start = time.perf_counter()
        self.plain.generate(**batch, **self._exactly())  # type: ignore[operator]
        return ours, time.perf_counter() - start

    def first_token(self, digest: str) -> None:
        """From a prompt to its first token by a resident adapter, nothing else running."""
        self.batcher.join([Generation(self.prompts[0], digest, 1, Sampling(temperature=0.0), lambda _: None)])
        while self.batcher.running:
            self.batcher.step()

    def show(self, rates: dict[str, list[float]], found: dict[str, float]) -> None:
        """The table, and the line."""
        rate = {name: statistics.median(values) for name, values in rates.items()}
        sizes = [f"{size:,} adapters" for size in self.sizes()]
        dtype = str(self.dtype).removeprefix("torch.")
        table = Table(title=f"{MODEL}, {dtype}, {self.arguments.streams} streams, {self.arguments.threads} threads")
        for column in ("", "tokens/s", "spread", "of the base model"):
            table.add_column(column, justify="left" if not column else "right")
        for name, values in rates.items():
            spread = f"{min(values):.0f} to {max(values):.0f}"
            table.add_row(name, f"{rate[name]:.0f}", spread, f"{rate[name] / rate['base model']:.2f}")
        console.print(table)
        for name, size in self.bytes.items():
            console.print(f"{self.arguments.adapters:,} adapters {name}: {size / 2**20:,.0f} MiB")
        one, most = sizes[0], sizes[-1]
        thousand = next((name for name in sizes if name.startswith("1,000 ")), most)
        line = {
            "tok_s_n1": rate[one],
            "n1000_vs_n1": rate[thousand] / rate[one],
            "n10000_vs_n1": rate[most] / rate[one],
            "n10000_vs_n1_no_hits": rate[f"{most}, no hits"] / rate[f"{one}, no hits"],
            "adapters_vs_base": rate[most] / rate["base model"],
            "adapters_vs_base_no_hits": rate[f"{most}, no hits"] / rate["base model"],
            "vs_peft_mixed_lora": rate[most] / rate["peft"],
            "vs_generate": rate[most] / rate["generate"],
            "zipf_vs_uniform": rate["zipf"] / rate[most],
            **found,
            "bytes_10000": self.bytes["with hits"] * 10_000 / self.arguments.adapters,
            "repetitions": self.arguments.repetitions,
            "threads": self.arguments.threads,
            "device": self.arguments.device,
            "dtype": dtype,
        }
        print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in line.items()}))


def latencies(bench: Bench) -> dict[str, float]:
    """What one request waits for."""
    times = 3 if bench.arguments.smoke else 20
    bench.serve(bench._uniform(bench.arguments.adapters, hits=True))
    under_load = bench.first_tokens
    pairs = [bench.one_stream() for _ in range(3 if bench.arguments.smoke else 5)]
    cold, warm = _cold_and_warm(bench, times)
    return {
        "cold_p50_ms": _percentile(cold, 50),
        "cold_p95_ms": _percentile(cold, 95),
        "warm_p50_ms": _percentile(warm, 50),
        "warm_p95_ms": _percentile(warm, 95),
        "cold_minus_warm_p95_ms": _percentile(cold, 95) - _percentile(warm, 95),
        "ttft_p50_ms": _percentile(under_load, 50),
        "ttft_p95_ms": _percentile(under_load, 95),
        "batch1_latency_vs_generate": statistics.median(ours for ours, _ in pairs)
        / statistics.median(theirs for _, theirs in pairs),
    }


def _cold_and_warm(bench: Bench, times: int) -> tuple[list[float], list[float]]:
    """Seconds from the commit of an adapter to its first token, and of a further request for it."""
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        database = make_engine(f"sqlite:///{folder}/bench.db")
        Base.metadata.create_all(database)
        store = AdapterStore(make_sessions(database))
        with Session(database) as session, session.begin():
            session.add(Project(id="bench", name="bench", slug="bench"))
        for artifact in artifacts(bench.base, bench.modules, times, hits=True, seed=1):
            name, digest = new_id("adapter"), artifact.manifest.digest
            with Session(database) as session, session.begin():
                session.add(row_of(name, artifact, project="bench"))
            start = time.perf_counter()
            loaded = store.load(name, digest)
            bench.bank.check(loaded.manifest)
            bench.bank.put(loaded)
            bench.first_token(digest)
            cold.append(time.perf_counter() - start)
            start = time.perf_counter()
            bench.first_token(digest)
            warm.append(time.perf_counter() - start)
        database.dispose()
    return cold, warm


def row_of(name: str, artifact: Artifact, *, project: str) -> Adapter:
    """An adapter as a trainer stores it."""
    manifest = artifact.manifest
    return Adapter(
        id=name,
        project_id=project,
        base_model=MODEL,
        digest=manifest.digest,
        manifest=manifest.model_dump(mode="json"),
        artifact=dumps(artifact),
    )


def artifacts(
    base: LocalModel, modules: tuple[ModuleShape, ...], count: int, *, hits: bool, seed: int = 0
) -> Iterator[Artifact]:
    """Adapters with vectors of the size of trained ones; with hits, every second direction was drawn anew twice."""
    spec = UoraSpec(r=RANK)
    draw = np.random.default_rng([seed, hits])
    fingerprint = adapter_fingerprint(spec, modules, BaseWeights.of_local(base, "chat", CACHE))
    provenance = Provenance(base_model=MODEL, base_digest=base.digest, data_sha256="0" * 64)
    manifest = Manifest.of(provenance, adapter=spec, modules=modules, fingerprint=fingerprint)
    outs = sum(module.out_features for module in modules)
    counts = np.where(np.arange(RANK) % 2, 2 * hits, 0).astype(np.int32)
    for _ in range(count):
        tensors = {
            "d": draw.normal(0.1, 0.02, (len(modules), RANK)).astype(np.float32),
            "b": draw.normal(0, 0.02, outs).astype(np.float32),
            "hits": counts,
        }
        yield loads(dumps(Artifact(manifest, tensors)))


def _mixed_lora(model: PreTrainedModel, count: int) -> Any:
    """Stock PEFT with so many LoRAs, whose second matrix is not zero."""
    config = LoraConfig(r=LORA_RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lora = get_peft_model(model, config, adapter_name="adapter0")
    for number in range(1, count):
        lora.add_adapter(f"adapter{number}", config)
    return lora.eval()


def _padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Left-padded, as ``generate`` wants them."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _percentile(seconds: Sequence[float], percent: int) -> float:
    """In milliseconds."""
    return float(np.percentile(seconds, percent)) * 1000


if __name__ == "__main__":
    main()
