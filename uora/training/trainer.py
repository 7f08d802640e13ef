"""One training run on transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from uora.artifact import Provenance
from uora.data import Dataset, Row
from uora.methods import attach, export_artifact
from uora.models import Batch, LocalModel, head_modules, load_model
from uora.spec import TrainingSpec, UoraSpec
from uora.svd import BaseWeights
from uora.training.callbacks import (
    DivergenceCallback,
    EvaluationCallback,
    ProgressCallback,
    ReinitialiseCallback,
    RunClock,
    StopCallback,
)
from uora.training.observer import TrainingObserver, TrainingResult
from uora.training.tasks import TrainingTask, training_task

#: Evaluations, each of which makes a checkpoint, in one run.
MAX_EVALUATIONS = 10
#: With a row longer than this, activations are recomputed in the backward pass instead of kept.
MAX_KEPT_ROW_TOKENS = 2048
#: Peak learning rate of a head with multiplier 1. Its weights are as those of any linear layer, whatever the method, so
#: rates that suit a method's vectors, up to 50 times higher, would tear it apart.
HEAD_LEARNING_RATE = 1e-3
_VALIDATION_ROWS_AT_ONCE = 64


def train(
    spec: TrainingSpec,
    *,
    base: LocalModel,
    training: Dataset[Row],
    validation: Dataset[Row] | None,
    observer: TrainingObserver,
    cache_dir: Path | None,
    dtype: torch.dtype,
) -> TrainingResult:
    """Train an adapter: AdamW with a linear decay of the learning rate, loss on what the task learns.

    The same arguments on the same machine give the same adapter, bit for bit where the processor's kernels do (in
    float32 on CPU they do). It seeds torch's and NumPy's global generators and writes nothing to disk but frames and
    singular vectors.

    Args:
        spec: what to train.
        base: the base model.
        training: rows to learn, of the spec's task.
        validation: rows to evaluate on after an epoch and at the end, at most `MAX_EVALUATIONS` times; None for none.
        observer: told of every step and evaluation; can stop the run.
        cache_dir: disk cache of frames and singular vectors; None for none.
        dtype: of the base model's weights; the adapter and its head are float32 always.

    Raises:
        DataError: a row does not fit the model, its template or the task.
        BaseModelError: the base model is none for the task.
        SpecError: the base model cannot be adapted as asked.
        TrainingStopped: the observer wanted to stop.
        UoraError: the training diverged (code ``training_diverged``).
    """
    task = training_task(spec.task, base, training)
    examples = task.examples(training)
    valid_examples = task.examples(validation) if validation else []
    weights = BaseWeights.of_local(base, spec.task, cache_dir)
    provenance = Provenance(
        base_model=base.name,
        base_digest=base.digest,
        chat_template_sha256=task.chat_template_sha256,
        data_sha256=training.sha256,
    )
    model = _adapted_model(spec, task, base, weights=weights, dtype=dtype)

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

    return _run(spec, task, model, examples, valid_examples, export=export, observer=observer)


def _adapted_model(
    spec: TrainingSpec, task: TrainingTask, base: LocalModel, *, weights: BaseWeights, dtype: torch.dtype
) -> PeftModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(base, dtype=dtype, device=device, task=spec.task, labels=task.labels, seed=spec.seed)
    return attach(model, spec.adapter, base=weights, head=head_modules(model), seed=spec.seed)


def _run(
    spec: TrainingSpec,
    task: TrainingTask,
    model: PeftModel,
    examples: list[Any],
    valid_examples: list[Any],
    *,
    export: Callable[[dict[str, float]], bytes],
    observer: TrainingObserver,
) -> TrainingResult:
    epochs = evaluation_epochs(spec.hyperparameters.n_epochs)
    clock = RunClock(evaluations=len(epochs))
    reinit = ReinitialiseCallback(enabled=isinstance(spec.adapter, UoraSpec))
    progress = ProgressCallback(observer, loss=task.loss, reinit=reinit, clock=clock)
    stop = StopCallback(observer)
    evaluation = EvaluationCallback(
        observer,
        epochs=epochs,
        progress=progress,
        loss=task.loss,
        clock=clock,
        has_validation=bool(valid_examples),
        export=export,
    )
    longest = max(task.length(example) for example in (*examples, *valid_examples))
    trainer = _PiecewiseTrainer(
        model=model,
        task=task,
        args=_arguments(spec, counts_tokens=task.counts_tokens, recompute_activations=longest > MAX_KEPT_ROW_TOKENS),
        packing=spec.options.packing,
        head_learning_rate=HEAD_LEARNING_RATE * spec.hyperparameters.learning_rate_multiplier,
        train_dataset=examples,
        eval_dataset=valid_examples or None,
        callbacks=[DivergenceCallback(task.loss), reinit, progress, evaluation, stop],
    )
    trainer.remove_callback(PrinterCallback)
    observer.on_start(spec.total_steps(len(examples)))
    stop.check()
    trainer.train()
    assert progress.latest is not None and evaluation.latest is not None  # noqa: S101, PT018
    return TrainingResult(
        artifact=evaluation.latest.artifact,
        trained_tokens=progress.latest.trained_tokens,
        steps=progress.latest.step,
        hits=reinit.hits,
        metrics=evaluation.latest.metrics,
    )


def evaluation_epochs(n_epochs: int) -> frozenset[int]:
    """The epochs, from 1, after which the adapter is evaluated: evenly spread, the last one among them."""
    stride = math.ceil(n_epochs / MAX_EVALUATIONS)
    return frozenset(range(n_epochs, 0, -stride))


class _Arguments(TrainingArguments):
    """One device, and no output directory: nothing of a run is written to disk."""

    @property
    def should_save(self) -> bool:
        return False

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


def _arguments(spec: TrainingSpec, *, counts_tokens: bool, recompute_activations: bool) -> TrainingArguments:
    return _Arguments(
        num_train_epochs=spec.hyperparameters.n_epochs,
        per_device_train_batch_size=spec.hyperparameters.batch_size,
        per_device_eval_batch_size=_VALIDATION_ROWS_AT_ONCE,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        seed=spec.seed,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=recompute_activations,
        activation_checkpointing_kwargs={"use_reentrant": False} if recompute_activations else None,
        include_num_input_tokens_seen="non_padding" if counts_tokens else "no",
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",  # the evaluation callback asks for them
        report_to="none",
        disable_tqdm=True,
    )


class _PiecewiseTrainer(Trainer):
    """A Trainer that passes a batch through the model in pieces of bounded size.

    The loss is a sum over predictions, divided by their number in the whole batch, so pieces add up to the same
    gradient; the optimizer steps once per batch.
    """

    def __init__(
        self,
        *,
        model: PeftModel,
        task: TrainingTask,
        args: TrainingArguments,
        packing: bool,
        head_learning_rate: float,
        **kwargs: Any,
    ) -> None:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args)
        groups = _parameter_groups(model, head_learning_rate=head_learning_rate)
        super().__init__(
            model=model,
            args=args,
            data_collator=task.collate,
            compute_loss_func=task.loss,
            optimizer_cls_and_kwargs=(optimizer, {**options, "params": groups}),
            **kwargs,
        )
        self._count = task.loss.count
        self._pieces = task.splitter(model, packing=packing)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward; returns the batch's loss."""
        count = self._count(inputs["labels"])
        losses = [super(_PiecewiseTrainer, self).training_step(model, piece, count) for piece in self._pieces(inputs)]
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Forward only. The meters of the loss function are read afterwards, so nothing is returned."""
        for piece in self._pieces(inputs):
            super().prediction_step(model, piece, prediction_loss_only, ignore_keys)
        return None, None, None


def _parameter_groups(model: PeftModel, *, head_learning_rate: float) -> list[dict[str, Any]]:
    """The adapter first, at the run's learning rate; then its head, if there is one, at its own."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name in trained if ".modules_to_save." in name}
    groups: list[dict[str, Any]] = [{"params": [p for name, p in trained.items() if name not in head]}]
    if head:
        groups.append({"params": [trained[name] for name in sorted(head)], "lr": head_learning_rate})
    return groups
