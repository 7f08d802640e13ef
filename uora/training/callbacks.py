"""What happens between the Trainer's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uora.errors import UoraError
from uora.training.loss import TaskLoss
from uora.training.observer import Evaluation, StepMetrics, TrainingObserver, TrainingStopped
from uora.tuner import reinitialise


class ReinitialiseCallback(TrainerCallback):
    """Applies UORA's reinitialisation once after every optimizer step, and counts the hits."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self.hits = 0

    def metrics(self) -> dict[str, float]:
        """``hits`` of the run so far; nothing for other methods."""
        return {"hits": float(self.hits)} if self._enabled else {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer, before the gradients are cleared."""
        if self._enabled:
            self.hits += reinitialise(kwargs["model"], step=state.global_step + 1)


class DivergenceCallback(TrainerCallback):
    """Ends a run whose loss or adapter is no number any more."""

    def __init__(self, loss: TaskLoss[Any]) -> None:
        self._loss = loss

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss of this step."""
        self._expect(self._loss.training.is_finite, "training loss", step=state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The adapter, its head included, that this step wrote."""
        model: nn.Module = kwargs["model"]
        finite = all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
        self._expect(finite, "adapter", step=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The validation loss."""
        self._expect(self._loss.validation.is_finite, "validation loss", step=state.global_step)

    def _expect(self, is_finite: bool, what: str, *, step: int) -> None:
        if not is_finite:
            raise UoraError(
                f"The {what} is not a finite number at step {step}: the training diverged. Lower the learning rate "
                "(learning_rate_multiplier, or learning_rate) and train again.",
                code="training_diverged",
            )


class StopCallback(TrainerCallback):
    """Asks the observer whether to go on."""

    def __init__(self, observer: TrainingObserver) -> None:
        self._observer = observer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After every optimizer step."""
        self.check()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After every batch of an evaluation."""
        self.check()

    def check(self) -> None:
        """Raises:
        TrainingStopped: the observer wants to stop.
        """
        if self._observer.should_stop():
            raise TrainingStopped


class ProgressCallback(TrainerCallback):
    """Tells the observer about every step."""

    def __init__(
        self, observer: TrainingObserver, *, loss: TaskLoss[Any], reinit: ReinitialiseCallback, clock: RunClock
    ) -> None:
        self._observer = observer
        self._loss = loss
        self._reinit = reinit
        self._clock = clock
        self._learning_rate = 0.0
        #: The latest step's, None before the first.
        self.latest: StepMetrics | None = None

    def metrics(self) -> dict[str, float]:
        """The latest step's loss and quality, and the hits, as an evaluation has them."""
        return _prefixed("train_", self._loss.training.metrics()) | self._reinit.metrics()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._loss.reset_training()
        self._clock.step_begins()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the learning rate before the scheduler moves it."""
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report."""
        self._clock.step_ends()
        train = self._loss.training.metrics()
        self.latest = StepMetrics(
            step=state.global_step,
            total_steps=state.max_steps,
            train_loss=train["loss"],
            train_mean_token_accuracy=train.get("mean_token_accuracy"),
            learning_rate=self._learning_rate,
            gradient_norm=0.0,
            tokens_per_second=self._clock.per_second(state.num_input_tokens_seen),
            seconds_left=self._clock.seconds_left(state.max_steps - state.global_step),
            hits=self._reinit.hits,
            trained_tokens=state.num_input_tokens_seen,
        )
        self._observer.on_step(self.latest)


class EvaluationCallback(TrainerCallback):
    """Evaluates after some epochs, the last one always among them, and hands the adapter to the observer."""

    def __init__(
        self,
        observer: TrainingObserver,
        *,
        epochs: frozenset[int],
        progress: ProgressCallback,
        loss: TaskLoss[Any],
        clock: RunClock,
        has_validation: bool,
        export: Callable[[dict[str, float]], bytes],
    ) -> None:
        self._observer = observer
        self._epochs = epochs
        self._progress = progress
        self._loss = loss
        self._clock = clock
        self._has_validation = has_validation
        self._export = export
        self._epochs_done = 0
        #: The latest, None before the first.
        self.latest: Evaluation | None = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer for an evaluation, or make one of the training metrics alone."""
        self._epochs_done += 1
        if self._epochs_done not in self._epochs:
            return
        self._clock.evaluation_begins()
        self._loss.reset_validation()
        if self._has_validation:
            control.should_evaluate = True
        else:
            self._publish(state.global_step, {})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer has run the model over the validation set."""
        valid = _prefixed("valid_", self._loss.validation.metrics())
        self._publish(state.global_step, valid | _prefixed("full_", valid))

    def _publish(self, step: int, valid_metrics: dict[str, float]) -> None:
        metrics = {"step": float(step), **self._progress.metrics(), **valid_metrics}
        self.latest = Evaluation(step, metrics, self._export(metrics))
        self._clock.evaluation_ends()
        self._observer.on_evaluation(self.latest)


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}


class RunClock:
    """Time spent in steps and in evaluations, from which the rest is estimated. Seconds throughout."""

    def __init__(self, *, evaluations: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._evaluations_left = evaluations
        self._begun = 0.0
        self._in_steps = 0.0
        self._steps = 0
        self._last_evaluation = 0.0

    def step_begins(self) -> None:
        """An optimizer step begins."""
        self._begun = self._now()

    def step_ends(self) -> None:
        """It ends."""
        self._in_steps += self._now() - self._begun
        self._steps += 1

    def evaluation_begins(self) -> None:
        """An evaluation begins."""
        self._begun = self._now()

    def evaluation_ends(self) -> None:
        """It ends."""
        self._last_evaluation = self._now() - self._begun
        self._evaluations_left -= 1

    def per_second(self, amount: int) -> float:
        """``amount`` over the time spent in steps."""
        return amount / max(self._in_steps, 1e-9)

    def seconds_left(self, steps_left: int) -> float:
        """Estimated seconds for the rest."""
        per_step = self._in_steps / max(self._steps, 1)
        return steps_left * per_step + self._evaluations_left * self._last_evaluation
