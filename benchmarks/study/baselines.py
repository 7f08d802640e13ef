"""Full fine-tuning and a head alone on transformers' Trainer, with the same rows, loss and head; and no training."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from benchmarks.study.bases import DTYPE
from benchmarks.study.data import dataset
from benchmarks.study.jobs import WARMUP, Job, Outcome
from benchmarks.study.scoring import Scores, score_labels
from uora.data import ImageRow, Row, TextRow
from uora.models import LocalModel, load_image_inputs, load_model, load_text_inputs
from uora.serving.classification import Item
from uora.training.tasks import Splitter, TrainingTask, training_task

_ROWS_AT_ONCE = 32
_FLOAT32_BYTES = 4


def run(job: Job, base: LocalModel) -> Outcome:
    """Train all weights (``full``) or the head only, and score."""
    task = training_task(job.task.kind, base, dataset(job.split.train), options=job.options)
    model = load_model(base, dtype=DTYPE, device="cpu", task=job.task.kind, labels=task.labels, seed=job.seed)
    head = {parameter for parameter in model.parameters() if parameter.requires_grad}  # as `load_model` leaves it
    in_head = sum(parameter.numel() for parameter in head)
    if job.config.method == "full":
        model.requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    seconds, trainer = _train(job, model, task, head)
    found = list(_predict(job, model.eval(), base, task.labels))
    expected = [cast(TextRow | ImageRow, row).label for row in job.split.test]
    return Outcome(
        scores=score_labels(job.metric, found, expected),
        trainable_parameters=trained - in_head,
        head_parameters=in_head,
        stored_bytes=trained * _FLOAT32_BYTES,
        seconds=seconds,
        tokens=trainer.state.num_input_tokens_seen,
        steps=trainer.state.global_step,
    )


class _InPieces(Trainer):
    """Rows of similar length go through the model together, as they do in the service's training."""

    def __init__(self, *, pieces: Splitter, **options: Any) -> None:
        super().__init__(**options)
        self._pieces = pieces

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every piece; each one's loss is over the number of rows of the whole batch."""
        total = torch.zeros(())
        for piece in self._pieces(inputs):
            total += super().training_step(model, piece, num_items_in_batch)
        return total


def _train(job: Job, model: PreTrainedModel, task: TrainingTask, head: set[nn.Parameter]) -> tuple[float, Trainer]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _InPieces(
            pieces=task.splitter(model, packing=False),
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=job.epochs,
                per_device_train_batch_size=job.task.batch,
                learning_rate=job.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=WARMUP,
                weight_decay=0.0,
                seed=job.seed,
                data_seed=job.seed,
                include_num_input_tokens_seen="non_padding" if task.counts_tokens else "no",
                remove_unused_columns=False,
                label_names=["labels"],
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=cast(Any, task.examples(dataset(job.split.train))),
            data_collator=task.collate,
            compute_loss_func=task.loss,
            optimizers=(_optimizer(job, model, head), None),
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
        return time.perf_counter() - begun, trainer


def _optimizer(job: Job, model: PreTrainedModel, head: set[nn.Parameter]) -> torch.optim.Optimizer:
    """The Trainer's own, with the head's rate for the head."""
    rest = [each for each in model.parameters() if each.requires_grad and each not in head]
    in_head = [each for each in model.parameters() if each in head]
    groups = [{"params": in_head, "lr": job.head_rate or job.learning_rate}, {"params": rest, "lr": job.learning_rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


@torch.inference_mode()
def _predict(job: Job, model: PreTrainedModel, base: LocalModel, labels: Sequence[str]) -> Iterator[str | float]:
    images = job.task.kind == "image-classification"
    inputs: Any = load_image_inputs(base) if images else load_text_inputs(base)
    rows = job.split.test
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        logits = model(**inputs.batch([item(row) for row in rows[start : start + _ROWS_AT_ONCE]])).logits
        # A regression's numbers are on the scale that they were learned on, which no correlation sees.
        yield from [labels[i] for i in logits.argmax(dim=-1).tolist()] if labels else logits.squeeze(-1).tolist()


def commonest(job: Job) -> Scores:
    """Of every row the commonest class of those to train on; of numbers their mean, which correlates with nothing."""
    learned, expected = (
        [cast(TextRow | ImageRow, row).label for row in rows] for rows in (job.split.train, job.split.test)
    )
    always = statistics.fmean(cast(list[float], learned)) if job.task.kind == "regression" else statistics.mode(learned)
    return score_labels(job.metric, [always] * len(expected), expected)


@torch.inference_mode()
def loss_of_base(job: Job, base: LocalModel) -> Scores:
    """What the base model makes of the rows to be scored, without any training."""
    task = training_task(job.task.kind, base, dataset(job.split.train), options=job.options)
    model = load_model(base, dtype=DTYPE, device="cpu", task=job.task.kind)
    examples, pieces = task.examples(dataset(job.split.test)), task.splitter(model, packing=True)
    for start in range(0, len(examples), _ROWS_AT_ONCE):
        for piece in pieces(task.collate(examples[start : start + _ROWS_AT_ONCE])):
            labels = piece.pop("labels")
            task.loss(model(**piece, use_cache=False), labels)
    return {"loss": task.loss.validation.metrics()["loss"]}


def item(row: Row) -> Item:
    """What a classifier is asked."""
    match row:
        case ImageRow(image=image):
            return image
        case TextRow(text=text, text_pair=None):
            return text
        case TextRow(text=text, text_pair=str(pair)):
            return text, pair
    raise TypeError(f"A {type(row).__name__} has no class.")


def length(row: Row) -> int:
    """By which rows are put into batches."""
    return len(row.text) + len(row.text_pair or "") if isinstance(row, TextRow) else 0
