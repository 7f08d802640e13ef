"""transformers' training loop, made to pass batches through the model in pieces and to go on from a `RunState`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from uora.models import Batch
from uora.spec import TrainingSpec
from uora.training.batches import Piece
from uora.training.callbacks import LatestGradient
from uora.training.memory import LatestBatch
from uora.training.processes import local_rank, merged, most, own_rows
from uora.training.sharding import exchanging, is_sharded
from uora.training.state import RngState, RunState, restore_model
from uora.training.tasks import Splitter, TrainingTask

_VALIDATION_ROWS_AT_ONCE = 64
#: transformers' names of our courses of the learning rate; its "constant" has no warm-up.
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class Arguments(TrainingArguments):
    """One device a process, and no output directory: nothing of a run is written to disk."""

    @property
    def should_save(self) -> bool:
        """Never: states go to the observer."""
        return False

    @property
    def n_gpu(self) -> int:
        """One at most."""
        return min(1, int(super().n_gpu))


def device() -> torch.device:
    """Where this process trains."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def arguments(
    spec: TrainingSpec, *, counts_tokens: bool, recompute_activations: bool, begin_with_evaluation: bool
) -> Arguments:
    """A run's arguments for the Trainer.

    Args:
        spec: the run.
        counts_tokens: whether its examples are made of tokens.
        recompute_activations: whether activations are computed again in the backward pass instead of kept.
        begin_with_evaluation: whether an evaluation comes before the first step.
    """
    options = spec.options
    return Arguments(
        num_train_epochs=spec.hyperparameters.n_epochs,
        per_device_train_batch_size=spec.hyperparameters.batch_size,
        per_device_eval_batch_size=_VALIDATION_ROWS_AT_ONCE,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=_SCHEDULERS[options.lr_scheduler_type],
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=not torch.cuda.is_available(),
        # A forward pass may be one of several before the processes exchange gradients: see `PiecewiseTrainer`.
        ddp_broadcast_buffers=False,
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
        eval_on_start=begin_with_evaluation,
        report_to="none",
        disable_tqdm=True,
    )


#: Takes a batch and the number of predictions in all batches of the optimizer step, has the gradients of the trained
#: parameters added up, and gives the loss: a forward and backward pass that is not made by the run itself.
Elsewhere = Callable[[Batch, Tensor | int | None], Tensor]


class PiecewiseTrainer(Trainer):
    """A Trainer that passes a batch through the model in pieces of bounded size.

    The loss is a sum over predictions, divided by their number in all batches of the optimizer step, so pieces, batches
    and the shares of several processes add up to the same gradient.
    """

    def __init__(
        self,
        *,
        model: PeftModel,
        task: TrainingTask,
        args: TrainingArguments,
        pieces: Splitter,
        elsewhere: Elsewhere | None,
        head_learning_rate: float,
        resume: RunState | None,
        gradient: LatestGradient,
        batch: LatestBatch,
        **kwargs: Any,
    ) -> None:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args)
        groups = parameter_groups(model, head_learning_rate=head_learning_rate, weight_decay=args.weight_decay)
        super().__init__(
            model=model,
            args=args,
            data_collator=task.collate,
            compute_loss_func=task.loss,
            optimizer_cls_and_kwargs=(optimizer, {**options, "params": groups}),
            **kwargs,
        )
        self._loss = task.loss
        self._pieces = pieces
        self._elsewhere = elsewhere
        self._resume = resume
        self._rng: RngState | None = None
        self._gradient = gradient
        self._batch = batch

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """A sharded one has been put in its place."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """What accelerate does not wrap itself, for training."""
        if training and is_sharded(model):
            return exchanging(model, device=self.args.device)
        return super()._wrap_model(model, training, dataloader)

    def create_accelerator_and_postprocess(self) -> None:
        """Without the search for garbage before a run, which lasts longer than a small run's step."""
        super().create_accelerator_and_postprocess()
        self.accelerator.free_memory = lambda *objects: list(objects)  # a new one holds nothing to free

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward; returns the loss of this process's rows."""
        self._batch.note(inputs)
        own = own_rows(inputs)
        if len(own["labels"]):
            return self._backward(model, own, num_items_in_batch)
        # A process without rows has a part in the exchange of gradients all the same: a row whose loss weighs nothing.
        with self._loss.unseen():
            return self._backward(model, {name: tensor[:1] for name, tensor in inputs.items()}, torch.tensor(torch.inf))

    def _backward(self, model: Any, inputs: Batch, count: Tensor | int | None) -> Tensor:
        if self._elsewhere is not None:
            return self._elsewhere(inputs, count)
        *pieces, last = self._pieces(inputs)
        if is_sharded(cast(PeftModel, self.model)):
            self._accompany(model, last, passes=most(len(pieces)) - len(pieces))
        losses = []
        for piece in pieces:
            with self.accelerator.no_sync(model):  # processes may have different numbers of pieces
                losses.append(super().training_step(model, piece, count))
        losses.append(super().training_step(model, last, count))
        return torch.stack(losses).sum()

    def _accompany(self, model: Any, piece: Piece, *, passes: int) -> None:
        """Passes that weigh nothing, so that processes with more pieces get this one's part of the weights for them."""
        with self._loss.unseen(), self.accelerator.no_sync(model):
            for _ in range(passes):
                super().training_step(model, piece, torch.tensor(torch.inf))

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Forward only. The meters of the loss function are read afterwards, so nothing is returned."""
        self._batch.note(inputs)
        own = own_rows(inputs)
        pieces = list(self._pieces(own)) if len(own["labels"]) else []
        is_shared = is_sharded(cast(PeftModel, self.model))
        idle = most(len(pieces)) - len(pieces) if is_shared else 0  # asked before the passes, where all are
        for piece in pieces:
            super().prediction_step(model, piece, prediction_loss_only, ignore_keys)
        if idle:
            some = next(self._pieces({name: tensor[:1] for name, tensor in inputs.items()}))
            with self._loss.unseen():  # as in `_accompany`
                for _ in range(idle):
                    super().prediction_step(model, some, prediction_loss_only, ignore_keys)
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Count what every process saw."""
        output = super().evaluation_loop(*args, **kwargs)
        self._loss.validation = merged(self._loss.validation)
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Without a validation set, callbacks alone."""
        if self.eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """The same batches in every process; accelerate would give each its own and fill the last ones up."""
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler_fn(dataset) if sampler_fn else None,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int:
        """Predictions that the labels of all batches of an optimizer step ask for."""
        return sum(self._loss.count(batch["labels"]) for batch in batch_samples)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Every process has the whole batch, so none has to ask the others."""
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += int(inputs["attention_mask"].sum())

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: nobody reads it, and transformers goes through all parameters for it at every step."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Keep the norm for the callbacks."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self._gradient.norm = float(norm)
        return norm

    # Going on from a state: what transformers reads from files of a checkpoint is in `RunState`.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_model(cast(PeftModel, self.model), self._resumed)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._resumed
        cast(Optimizer, self.optimizer).load_state_dict(state.optimizer)
        cast(LRScheduler, self.lr_scheduler).load_state_dict(state.scheduler)
        state.rng.restore()
        shutil.rmtree(checkpoint)  # its only file, the TrainerState, has been read

    @property
    def _resumed(self) -> RunState:
        if self._resume is None:
            raise ValueError("train() was given a checkpoint, but the trainer no state to resume")
        return self._resume

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:  # an evaluation before the first step ended the run
            return
        self._rng = RngState.capture()
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Take back what was drawn to skip batches of an epoch that others have trained on."""
        if checkpoint is not None and self._rng is not None:
            self._rng.restore()


def parameter_groups(model: PeftModel, *, head_learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """The adapter first, at the run's learning rate; then its head, if there is one, at its own.

    As everywhere in transformers, a head's biases and norms do not decay.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [trained[name] for name in sorted(trained) if ".modules_to_save." in name]
    vectors = [parameter for name, parameter in trained.items() if ".modules_to_save." not in name]
    groups = [
        {"params": vectors, "weight_decay": weight_decay},
        {"params": [p for p in head if p.dim() > 1], "lr": head_learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in head if p.dim() <= 1], "lr": head_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
