"""One training run on transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from uora.artifact import Provenance
from uora.data import ChatDataset, Example, encode_dataset, template_sha256
from uora.errors import SpecError
from uora.models import LocalModel, context_tokens, load_model, load_tokenizer
from uora.spec import AdapterSpec, TrainingSpec
from uora.training.batches import Batch, collate, split
from uora.training.callbacks import (
    DivergenceCallback,
    EvaluationCallback,
    ProgressCallback,
    ReinitialiseCallback,
    RunClock,
    StopCallback,
)
from uora.training.loss import LearnedTokenLoss, keeps_masked_logits, predicting_positions
from uora.training.observer import TrainingObserver, TrainingResult
from uora.tuner import UoraConfig, export_artifact

#: Evaluations, each of which makes a checkpoint, in one run.
MAX_EVALUATIONS = 10
#: Tokens, padding included, that go through the model at once, by device. It bounds the memory for activations
#: (measured: about 1 MiB a token for SmolLM2-135M with all linear layers adapted). Small pieces also have less
#: padding, since rows of similar length go together: 11 % instead of 36 % for batches of 16 movie reviews.
MAX_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}
#: With a row longer than this, activations are recomputed in the backward pass instead of kept.
MAX_KEPT_ROW_TOKENS = 2048
_VALIDATION_ROWS_AT_ONCE = 64


def train(
    spec: TrainingSpec,
    *,
    base: LocalModel,
    training: ChatDataset,
    validation: ChatDataset | None,
    observer: TrainingObserver,
    frame_cache_dir: Path | None,
    dtype: torch.dtype,
) -> TrainingResult:
    """Train an adapter: AdamW with a linear decay of the learning rate, loss on the assistant's tokens.

    The same arguments on the same machine give the same adapter, bit for bit where the processor's kernels do (in
    float32 on CPU they do). It seeds torch's and NumPy's global generators and writes nothing to disk but frames.

    Args:
        spec: what to train.
        base: the base model.
        training: rows to learn.
        validation: rows to evaluate on after an epoch and at the end, at most `MAX_EVALUATIONS` times; None for none.
        observer: told of every step and evaluation; can stop the run.
        frame_cache_dir: disk cache of frames; None for none.
        dtype: of the base model's weights; the adapter's vectors are float32 always.

    Raises:
        DataError: a row does not fit the model or its template.
        SpecError: the targets do not name linear layers of the model.
        TrainingStopped: the observer wanted to stop.
        UoraError: the training diverged (code ``training_diverged``).
    """
    tokenizer = load_tokenizer(base)
    max_tokens = context_tokens(base)
    examples = list(encode_dataset(training, tokenizer, max_tokens=max_tokens))
    valid_examples = list(encode_dataset(validation, tokenizer, max_tokens=max_tokens)) if validation else []
    model = _adapted_model(spec.adapter, base, frame_cache_dir=frame_cache_dir, dtype=dtype)
    provenance = Provenance(
        base_model=base.name,
        base_digest=base.digest,
        chat_template_sha256=template_sha256(tokenizer),
        data_sha256=training.sha256,
    )
    return _run(spec, model, examples, valid_examples, provenance=provenance, observer=observer)


def _adapted_model(
    adapter: AdapterSpec, base: LocalModel, *, frame_cache_dir: Path | None, dtype: torch.dtype
) -> PeftModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = UoraConfig.of(adapter, target_modules=_target_modules(adapter), frame_cache_dir=frame_cache_dir)
    try:
        return get_peft_model(load_model(base, dtype=dtype, device=device), config)
    except ValueError as error:  # PEFT's word for targets that match nothing
        raise SpecError(
            f"The targets {adapter.targets} cannot be adapted in {base.name}: {error}", param="targets"
        ) from error


def _target_modules(adapter: AdapterSpec) -> str | list[str] | None:
    """The targets in PEFT's terms; None lets it take the query and value projections of the model's family."""
    match adapter.targets:
        case "all-linear":
            return "all-linear"
        case "q,v":
            return None
        case names:
            return list(names)


def _run(
    spec: TrainingSpec,
    model: PeftModel,
    examples: Sequence[Example],
    valid_examples: Sequence[Example],
    *,
    provenance: Provenance,
    observer: TrainingObserver,
) -> TrainingResult:
    loss = LearnedTokenLoss()
    epochs = evaluation_epochs(spec.hyperparameters.n_epochs)
    clock = RunClock(evaluations=len(epochs))
    reinit = ReinitialiseCallback()
    progress = ProgressCallback(observer, loss=loss, reinit=reinit, clock=clock)
    stop = StopCallback(observer)
    evaluation = EvaluationCallback(
        observer,
        epochs=epochs,
        progress=progress,
        loss=loss,
        clock=clock,
        has_validation=bool(valid_examples),
        export=lambda metrics: export_artifact(model, provenance=provenance, metrics=metrics),
    )
    longest = max(len(example.input_ids) for example in (*examples, *valid_examples))
    trainer = _TokenBoundedTrainer(
        model=model,
        args=_arguments(spec, recompute_activations=longest > MAX_KEPT_ROW_TOKENS),
        data_collator=collate,
        train_dataset=examples,
        eval_dataset=valid_examples or None,
        compute_loss_func=loss,
        callbacks=[DivergenceCallback(loss), reinit, progress, evaluation, stop],
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


def _arguments(spec: TrainingSpec, *, recompute_activations: bool) -> TrainingArguments:
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
        include_num_input_tokens_seen="non_padding",
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


class _TokenBoundedTrainer(Trainer):
    """A Trainer that passes a batch through the model in pieces of bounded size.

    The loss is a sum over learned tokens, divided by their number in the whole batch, so pieces add up to the same
    gradient; the optimizer steps once per batch.
    """

    def __init__(self, *, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self._keeps_masked_logits = keeps_masked_logits(model)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward; returns the batch's loss."""
        losses = [
            super(_TokenBoundedTrainer, self).training_step(model, piece, num_items_in_batch)
            for piece in self._pieces(inputs)
        ]
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Forward only. The meters of the loss function are read afterwards, so nothing is returned."""
        for piece in self._pieces(inputs):
            super().prediction_step(model, piece, prediction_loss_only, ignore_keys)
        return None, None, None

    def _pieces(self, inputs: Batch) -> Iterator[Batch]:
        for piece in split(inputs, max_tokens=MAX_TOKENS_AT_ONCE[self.args.device.type]):
            # A causal model's tokens never see the padding on their right; without a mask, attention takes a
            # faster kernel.
            del piece["attention_mask"]
            if self._keeps_masked_logits:
                piece["logits_to_keep"] = predicting_positions(piece["labels"])
            yield piece
