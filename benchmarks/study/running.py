"""One run: train, predict, score. Adapters go the way of the service: ``uora.training``, then ``uora.serving``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict, cast

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.study import baselines
from benchmarks.study.bases import DTYPE, Bases
from benchmarks.study.data import Split, dataset
from benchmarks.study.jobs import Job, Outcome
from benchmarks.study.plan import NONE
from benchmarks.study.scoring import Scores, score_labels, score_texts
from uora.artifact import Artifact, loads
from uora.data import CompletionRow, ImageRow, Row, TextRow, prompt_ids
from uora.models import LocalModel, load_image_inputs, load_model, load_text_inputs, load_tokenizer
from uora.serving.bank import AdapterBank
from uora.serving.classification import Classifier, Item, Prediction
from uora.serving.generation import Batcher, Delta, Generation
from uora.serving.heads import Heads
from uora.serving.sampling import Sampling
from uora.spec import Task as Kind
from uora.svd import BaseWeights
from uora.training import Evaluation, StepMetrics, TrainingResult, train
from uora.training.cotraining import Member, cotrain

#: Answers that are written, and rows that are classified, at once.
ANSWERS_AT_ONCE, ROWS_AT_ONCE = 24, 32


@dataclass
class Watch:
    """A ``TrainingObserver`` that keeps the time from the first step's begin to the last one's end."""

    seconds: float = 0.0
    last: StepMetrics | None = None
    _begun: float = 0.0

    def on_start(self, total_steps: int) -> None:
        """Data and model are ready."""
        self._begun = time.perf_counter()

    def on_step(self, metrics: StepMetrics) -> None:
        """Keep it."""
        self.seconds, self.last = time.perf_counter() - self._begun, metrics

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Nothing to keep: the result holds the adapter."""

    def on_state(self, step: int, state: bytes) -> None:
        """Nothing to keep: a run that is broken is made again."""

    def should_stop(self) -> bool:
        """Never."""
        return False


@dataclass
class Runner:
    """Runs jobs; what they serve with is loaded once for each base model and kind of task."""

    bases: Bases
    max_answer_tokens: int = 80
    _classifiers: dict[tuple[str, Kind], _Server] = field(default_factory=dict)
    _writers: dict[str, _Writer] = field(default_factory=dict)

    def run(self, job: Job) -> Outcome:
        """Train and score."""
        if job.config == NONE:
            return self._untrained(job)
        if job.config.method in ("full", "head"):
            return baselines.run(job, self.bases.get(job.task.base))
        watch = Watch()
        result = train(**vars(_member(job, watch)), **self._where(job))
        return self._outcome(job, result, watch.seconds)

    def run_together(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Train jobs of one `cotraining_key` in one training, each with its share of the seconds; score each."""
        watches = [Watch() for _ in jobs]
        results = cotrain(
            [_member(job, watch) for job, watch in zip(jobs, watches, strict=True)], **self._where(jobs[0])
        )
        seconds = max(watch.seconds for watch in watches) / len(jobs)
        return [self._outcome(job, _made(result), seconds) for job, result in zip(jobs, results, strict=True)]

    def _where(self, job: Job) -> _Where:
        return {"base": self.bases.get(job.task.base), "cache_dir": self.bases.places.cache, "dtype": DTYPE}

    def _outcome(self, job: Job, result: TrainingResult, seconds: float) -> Outcome:
        artifact = loads(result.artifact)
        if job.metric == "loss":
            scores = {"loss": result.metrics["valid_loss"]}
        else:
            scores = self._score(job, self.bases.get(job.task.base), artifact)
        return Outcome(
            scores=scores,
            trainable_parameters=artifact.manifest.trainable_parameters,
            head_parameters=artifact.manifest.head_parameters,
            stored_bytes=len(result.artifact),
            seconds=seconds,
            tokens=result.trained_tokens,
            steps=result.steps,
            hits=result.hits,
        )

    def _untrained(self, job: Job) -> Outcome:
        """The base model as it is; where a head would be random, what needs no model."""
        if job.task.has_head:
            return Outcome(scores=baselines.commonest(job))
        base = self.bases.get(job.task.base)
        if job.metric == "loss":
            scores = baselines.loss_of_base(job, base)
        else:
            scores = self._writer(base).score(job.split, None)
        return Outcome(scores=scores)

    def _score(self, job: Job, base: LocalModel, artifact: Artifact) -> Scores:
        if job.task.kind == "completion":
            return self._writer(base).score(job.split, artifact)
        key = (base.name, job.task.kind)
        if key not in self._classifiers:
            self._classifiers[key] = _Server(base, job.task.kind, self.bases)
        return score_labels(
            job.metric,
            [decided(each) for each in self._classifiers[key].predict(job.split.test, artifact)],
            [cast(TextRow | ImageRow, row).label for row in job.split.test],
        )

    def _writer(self, base: LocalModel) -> _Writer:
        if base.name not in self._writers:
            self._writers[base.name] = _Writer(base, self.bases, self.max_answer_tokens)
        return self._writers[base.name]


class _Where(TypedDict):
    """What trainings of one base model share."""

    base: LocalModel
    cache_dir: Path
    dtype: torch.dtype


def _member(job: Job, watch: Watch) -> Member:
    held_out = dataset(job.split.test) if job.metric == "loss" else None
    return Member(job.training_spec(), dataset(job.split.train), held_out, watch)


def _made(result: TrainingResult | Exception) -> TrainingResult:
    if isinstance(result, Exception):
        raise result
    return result


@dataclass
class _Server:
    """A classifier as the engine has one, with room for one adapter after the other."""

    base: LocalModel
    kind: Kind
    bases: Bases

    @cached_property
    def _parts(self) -> tuple[AdapterBank, Classifier]:
        model = load_model(self.base, dtype=DTYPE, device="cpu", task=self.kind)
        heads = Heads(model)
        weights = BaseWeights.of_local(self.base, self.kind, self.bases.places.cache)
        bank = AdapterBank(model, base_digest=self.base.digest, weights=weights, heads=heads)
        inputs = load_image_inputs(self.base) if self.kind == "image-classification" else load_text_inputs(self.base)
        return bank, Classifier(model, inputs, bank, heads)

    def predict(self, rows: Sequence[Row], artifact: Artifact) -> list[Prediction]:
        """What the adapter says of each row."""
        bank, classifier = self._parts
        bank.check(artifact.manifest)
        digest = bank.put(artifact).digest
        found: dict[int, Prediction] = {}
        order = sorted(range(len(rows)), key=lambda i: baselines.length(rows[i]))  # so that little is padding
        for start in range(0, len(order), ROWS_AT_ONCE):
            places = order[start : start + ROWS_AT_ONCE]
            items: list[Item] = [baselines.item(rows[i]) for i in places]
            found.update(zip(places, classifier.predict(items, [digest] * len(items)), strict=True))
        bank.remove(digest)
        return [found[i] for i in range(len(rows))]


def decided(prediction: Prediction) -> str | float:
    """The likeliest class; a number as it is."""
    return prediction if isinstance(prediction, float) else max(prediction, key=lambda label: prediction[label])


@dataclass
class _Writer:
    """The engine's batch, greedy, with one adapter after the other."""

    base: LocalModel
    bases: Bases
    max_tokens: int

    @cached_property
    def _parts(self) -> tuple[AdapterBank, Batcher]:
        cache = self.bases.places.cache
        model = load_model(self.base, dtype=DTYPE, device="cpu", task="completion", copies_in=cache)
        weights = BaseWeights.of_local(self.base, "completion", cache)
        bank = AdapterBank(model, base_digest=self.base.digest, weights=weights)
        tokenizer = cast(PreTrainedTokenizerFast, load_tokenizer(self.base))
        return bank, Batcher(model, tokenizer, bank, max_rows=ANSWERS_AT_ONCE, context=512)

    def score(self, split: Split, artifact: Artifact | None) -> Scores:
        """What is written to every prompt against its references."""
        bank, _ = self._parts
        digest = None
        if artifact is not None:
            bank.check(artifact.manifest)
            digest = bank.put(artifact).digest
        texts = self._write([cast(CompletionRow, row).prompt for row in split.test], digest)
        if digest is not None:
            bank.remove(digest)
        return score_texts(texts, split.references)

    def _write(self, prompts: Sequence[str], digest: str | None) -> list[str]:
        _, batcher = self._parts
        tokenizer = load_tokenizer(self.base)
        pieces: list[list[str]] = [[] for _ in prompts]

        def keep(index: int, item: Delta | Exception) -> None:
            if isinstance(item, Exception):
                raise item
            pieces[index].append(item.text)

        waiting = [
            Generation(
                prompt=prompt_ids(tokenizer, prompt),
                adapter=digest,
                max_tokens=self.max_tokens,
                sampling=Sampling(temperature=0.0),
                emit=lambda item, index=index: keep(index, item),  # type: ignore[misc]
            )
            for index, prompt in enumerate(prompts)
        ]
        while waiting or batcher.running:
            joining, waiting = waiting[: batcher.free_rows], waiting[batcher.free_rows :]
            batcher.join(joining)
            with torch.inference_mode():
                batcher.step()
        return ["".join(each).strip() for each in pieces]
