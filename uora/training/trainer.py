"""One training run on transformers' Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from uora.artifact import Artifact, Provenance
from uora.data import Dataset, Row
from uora.errors import SpecError, UoraError
from uora.methods import attach, export_artifact
from uora.models import LocalModel, head_modules, load_model
from uora.spec import TrainingSpec, UoraSpec
from uora.svd import BaseWeights
from uora.training import state
from uora.training.callbacks import (
    Best,
    DivergenceCallback,
    EvaluationCallback,
    InitialPairCallback,
    LatestGradient,
    ProgressCallback,
    ReinitialiseCallback,
    RunClock,
    StateCallback,
    StopCallback,
)
from uora.training.loop import Arguments, Elsewhere, PiecewiseTrainer, arguments, device
from uora.training.memory import LatestBatch, explained_memory_errors
from uora.training.observer import TrainingObserver, TrainingResult, TrainingStopped
from uora.training.processes import FirstProcessObserver
from uora.training.sharding import check_processes, shard_base
from uora.training.state import Json, Resumable, RunState
from uora.training.tasks import Splitter, TrainingTask, training_task
from uora.training.warm_start import start_from

#: Evaluations, each of which makes a checkpoint, in a run that does not say how often it wants them.
MAX_EVALUATIONS = 10
#: With a row longer than this, activations are recomputed in the backward pass instead of kept.
MAX_KEPT_ROW_TOKENS = 2048
#: Peak learning rate of a head with multiplier 1. Its weights are as those of any linear layer, whatever the method, so
#: rates that suit a method's vectors, up to 10 times higher, would tear it apart. docs/results.md has others beside it.
HEAD_LEARNING_RATE = 1e-2


def train(
    spec: TrainingSpec,
    *,
    base: LocalModel,
    training: Dataset[Row],
    validation: Dataset[Row] | None,
    observer: TrainingObserver,
    cache_dir: Path | None,
    dtype: torch.dtype,
    resume: bytes | None = None,
    warm_start: Artifact | None = None,
    shard: bool = False,
) -> TrainingResult:
    """Train an adapter with AdamW; the loss is that of what the task learns.

    The same arguments on the same machine give the same adapter, bit for bit where the processor's kernels do (in
    float32 on CPU they do), whether or not the run was broken and resumed. It seeds the global generators of Python,
    NumPy and torch and writes nothing to disk but what ``cache_dir`` is for.

    Under ``torchrun`` each process calls it with the same arguments. They share every batch, so ``batch_size`` is that
    of all together and the adapter is, but for rounding, that of one process. The first one's observer alone is told
    and asked, and a state has the generators of that one, so that dropout in the others goes on with other masks.

    Args:
        spec: what to train, and how (`uora.spec.TrainingOptions`).
        base: the base model.
        training: rows to learn, of the spec's task.
        validation: rows to evaluate on, after every epoch but at most `MAX_EVALUATIONS` times, or every
            ``options.eval_steps`` steps; after the last step in any case. None for none.
        observer: told of every step, evaluation and state; can stop the run.
        cache_dir: disk cache of frames, singular vectors and weights in ``dtype``; None for none.
        dtype: of the base model's weights; the adapter and its head are float32 always.
        resume: a state that a run with the same arguments gave to ``observer.on_state``, to go on from; None to start.
            An evaluation that was due at that step is made (again).
        warm_start: an adapter of the same base model, method, rank and modules to start from instead of the method's
            own start; None for that.
        shard: hold a part of the base model in each process instead of all of it (``uora.training.sharding``).

    Raises:
        DataError: a row does not fit the model, its template or the task.
        BaseModelError: the base model is none for the task.
        SpecError: the base model cannot be adapted as asked, an option needs a validation set, the adapter to start
            from is another one, or ``shard`` is asked of one process or of a base model that cannot be sharded.
        StateError: the state to resume is of another run.
        TrainingStopped: the observer wanted to stop; it has been given the state.
        OutOfMemory: there is not enough memory.
        UoraError: the training diverged (code ``training_diverged``); the observer has been given the last good state.
    """
    if spec.options.needs_validation and not (validation and validation.rows):
        param = "load_best_model_at_end" if spec.options.load_best_model_at_end else "early_stopping_patience"
        raise SpecError(
            f"{param} compares losses on a validation set, found none. Give a validation file or leave {param} out.",
            param=param,
        )
    if shard:
        check_processes()
    place = torch.device("cpu") if shard else device()  # whole, it may not fit where it is trained
    batch = LatestBatch()
    with explained_memory_errors(batch):
        run = prepare(
            spec, base=base, training=training,
            load=partial(load, spec, base=base, dtype=dtype, place=place, copies_in=cache_dir),
            validation=validation, cache_dir=cache_dir, resume=resume, warm_start=warm_start,
        )  # fmt: skip
    return train_run(run, FirstProcessObserver(observer), batch, shard=shard)


@dataclass(frozen=True)
class Loaded:
    """A base model in memory, and how batches go through it."""

    model: PreTrainedModel
    pieces: Splitter


def load(
    spec: TrainingSpec,
    task: TrainingTask,
    *,
    base: LocalModel,
    dtype: torch.dtype,
    place: torch.device,
    copies_in: Path | None,
) -> Loaded:
    """The base model for a run of its own, whole in one place."""
    model = load_model(
        base, dtype=dtype, device=place, task=spec.task, labels=task.labels, seed=spec.seed, copies_in=copies_in
    )
    return Loaded(model, task.splitter(model, packing=spec.options.packing))


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of.

    Attributes:
        identity: what a state must be of.
        pieces: how batches go through the model.
        resume: the state to go on from.
        export: the adapter as it is now, with its metrics.
    """

    spec: TrainingSpec
    task: TrainingTask
    model: PeftModel
    pieces: Splitter
    examples: list[Any]
    valid_examples: list[Any]
    identity: Json
    resume: RunState | None
    export: Callable[[dict[str, float]], bytes]

    @property
    def total_steps(self) -> int:
        return self.spec.total_steps(len(self.examples))

    @property
    def evaluation_steps(self) -> frozenset[int]:
        return evaluation_steps(self.spec, n_examples=len(self.examples))


def prepare(
    spec: TrainingSpec,
    *,
    base: LocalModel,
    load: Callable[[TrainingTask], Loaded],
    training: Dataset[Row],
    validation: Dataset[Row] | None,
    cache_dir: Path | None,
    resume: bytes | None,
    warm_start: Artifact | None,
) -> Run:
    """Read rows, load the base model and put the adapter on it; raises as `train`."""
    identity = state.run_identity(
        spec,
        base_digest=base.digest,
        training_sha256=training.sha256,
        validation_sha256=validation.sha256 if validation else None,
    )
    resumed = None if resume is None else state.loads(resume, run=identity)
    task = training_task(spec.task, base, training, options=spec.options)
    examples = task.examples(training)
    valid_examples = task.examples(validation) if validation else []
    weights = BaseWeights.of_local(base, spec.task, cache_dir)
    loaded = load(task)
    bare = loaded.model
    model = attach(bare, spec.adapter, base=weights, head=head_modules(bare), seed=spec.seed)
    if warm_start is not None and resumed is None:
        start_from(model, warm_start, spec=spec, task=task, base=base, weights=weights)
    provenance = Provenance(
        base_model=base.name,
        base_digest=base.digest,
        chat_template_sha256=task.chat_template_sha256,
        data_sha256=training.sha256,
    )

    def export(metrics: dict[str, float]) -> bytes:
        with task.as_stored(model):
            return export_artifact(
                model,
                spec.adapter,
                base=weights,
                provenance=provenance,
                task=spec.task,
                labels=task.labels,
                metrics=metrics,
            )

    return Run(spec, task, model, loaded.pieces, examples, valid_examples, identity, resumed, export)


@dataclass(frozen=True)
class _Parts:
    """What happens between the steps of a run."""

    gradient: LatestGradient
    reinit: ReinitialiseCallback
    progress: ProgressCallback
    best: Best
    evaluation: EvaluationCallback
    states: StateCallback
    stop: StopCallback
    resumable: Mapping[str, Resumable]

    @classmethod
    def of(cls, run: Run, observer: TrainingObserver) -> Self:
        """New ones, or as they were in the state to go on from."""
        options, loss = run.spec.options, run.task.loss
        clock, gradient = RunClock(evaluations=len(run.evaluation_steps)), LatestGradient()
        reinit = ReinitialiseCallback(enabled=isinstance(run.spec.adapter, UoraSpec))
        progress = ProgressCallback(observer, loss=loss, gradient=gradient, reinit=reinit, clock=clock)
        best = Best(
            min_delta=options.early_stopping_min_delta,
            patience=options.early_stopping_patience,
            keep=options.load_best_model_at_end,
        )
        evaluation = EvaluationCallback(
            observer,
            steps=run.evaluation_steps,
            progress=progress,
            best=best,
            loss=loss,
            clock=clock,
            has_validation=bool(run.valid_examples),
            export=run.export,
        )
        resumable: dict[str, Resumable] = {"clock": clock, "reinit": reinit, "progress": progress, "best": best}
        states = StateCallback(
            observer,
            run=run.identity,
            every=options.save_steps,
            evaluation_steps=run.evaluation_steps,
            parts=resumable,
            best=best,
            handed_over=run.resume.step if run.resume else 0,
        )
        parts = cls(gradient, reinit, progress, best, evaluation, states, StopCallback(observer), resumable)
        if run.resume is not None:
            parts._restore(run.resume)
        return parts

    def _restore(self, resume: RunState) -> None:
        for name, part in self.resumable.items():
            part.restore(resume.parts[name])
        self.best.evaluation = resume.best

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        """In the order in which they hear of a step: nothing is told or stored of one that diverged."""
        divergence = DivergenceCallback(run.task.loss, self.gradient)
        initial_pair = InitialPairCallback(run.spec.adapter)
        return [divergence, initial_pair, self.reinit, self.progress, self.evaluation, self.states, self.stop]


def train_run(
    run: Run,
    observer: TrainingObserver,
    batch: LatestBatch,
    *,
    elsewhere: Elsewhere | None = None,
    shard: bool = False,
) -> TrainingResult:
    """Run it to its end; raises as `train`.

    Args:
        run: what to train.
        observer: told of every step, evaluation and state.
        batch: noted there for errors of memory.
        elsewhere: who makes its forward and backward passes; None for the run itself.
        shard: share the base model out among the processes.
    """
    parts = _Parts.of(run, observer)
    args = _arguments(run)
    if shard:
        with explained_memory_errors(batch):
            shard_base(run.model, device=args.device)
    trainer = _trainer(run, parts, batch, elsewhere, args)
    observer.on_start(run.total_steps)
    parts.stop.check()
    try:
        with explained_memory_errors(batch):
            _loop(trainer, run.resume)
    except (TrainingStopped, UoraError):
        parts.states.hand_over()
        raise
    result = parts.best.evaluation or parts.evaluation.latest
    assert result is not None  # noqa: S101 # the last step of every run is evaluated
    return TrainingResult(
        artifact=result.artifact,
        trained_tokens=trainer.state.num_input_tokens_seen,
        steps=trainer.state.global_step,
        hits=parts.reinit.hits,
        metrics=result.metrics,
        stopped_early=trainer.state.global_step < run.total_steps,
        best_step=parts.best.step,
    )


def _arguments(run: Run) -> Arguments:
    return arguments(
        run.spec,
        counts_tokens=run.task.counts_tokens,
        recompute_activations=_recomputes_activations(run),
        begin_with_evaluation=run.resume is not None and run.resume.step in run.evaluation_steps,
    )


def _trainer(
    run: Run, parts: _Parts, batch: LatestBatch, elsewhere: Elsewhere | None, args: Arguments
) -> PiecewiseTrainer:
    spec = run.spec
    default_rate = HEAD_LEARNING_RATE * spec.hyperparameters.learning_rate_multiplier
    trainer = PiecewiseTrainer(
        model=run.model,
        task=run.task,
        args=args,
        pieces=run.pieces,
        elsewhere=elsewhere,
        head_learning_rate=spec.options.head_learning_rate or default_rate,
        resume=run.resume,
        gradient=parts.gradient,
        batch=batch,
        train_dataset=run.examples,
        eval_dataset=run.valid_examples or None,
        callbacks=parts.callbacks(run),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _loop(trainer: PiecewiseTrainer, resume: RunState | None) -> None:
    if resume is None:
        trainer.train()
        return
    with TemporaryDirectory() as folder:
        # The Trainer reads this one file itself; the rest it asks `PiecewiseTrainer` for.
        (Path(folder) / TRAINER_STATE_NAME).write_text(json.dumps(resume.trainer))
        trainer.train(resume_from_checkpoint=folder)


def _recomputes_activations(run: Run) -> bool:
    wanted = run.spec.options.gradient_checkpointing
    longest = max(run.task.length(example) for example in (*run.examples, *run.valid_examples))
    return longest > MAX_KEPT_ROW_TOKENS if wanted == "auto" else wanted


def evaluation_steps(spec: TrainingSpec, *, n_examples: int) -> frozenset[int]:
    """The optimizer steps, from 1, after which the adapter is evaluated: the last one is among them."""
    total, every, n_epochs = spec.total_steps(n_examples), spec.options.eval_steps, spec.hyperparameters.n_epochs
    if every is None:
        return frozenset(epoch * (total // n_epochs) for epoch in evaluation_epochs(n_epochs))
    return frozenset({*range(every, total, every), total})


def evaluation_epochs(n_epochs: int) -> frozenset[int]:
    """The epochs, from 1, after which the adapter is evaluated: evenly spread, the last one among them."""
    stride = math.ceil(n_epochs / MAX_EVALUATIONS)
    return frozenset(range(n_epochs, 0, -stride))
