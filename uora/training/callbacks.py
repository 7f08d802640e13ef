"""What happens between the Trainer's steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uora.errors import UoraError
from uora.methods import adapted_layers
from uora.spec import AdapterSpec, OloraSpec
from uora.training.loss import TaskLoss
from uora.training.observer import Evaluation, StepMetrics, TrainingObserver, TrainingStopped
from uora.training.processes import merged
from uora.training.state import Json, Resumable, RngState, RunState, changing_tensors, dumps
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

    def state(self) -> Json:
        """The hits."""
        return {"hits": self.hits}

    def restore(self, state: Json) -> None:
        """Go on counting from there."""
        self.hits = state["hits"]


class InitialPairCallback(TrainerCallback):
    """Keeps OLoRA's initial pair out of weight decay, which takes from every number of a parameter.

    The pair is the second half of a parameter, and its gradient is zero.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec
        self._pairs: list[Tensor] = []
        self._initial: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember it, if there is one and anything decays."""
        if not isinstance(self._spec, OloraSpec) or args.weight_decay == 0.0:
            return
        r = self._spec.r
        for layer in adapted_layers(kwargs["model"]).values():
            self._pairs += [layer.lora_A["default"].weight.detach()[r:], layer.lora_B["default"].weight.detach()[:, r:]]
        self._initial = [half.clone() for half in self._pairs]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put it back."""
        for half, initial in zip(self._pairs, self._initial, strict=True):
            half.copy_(initial)


@dataclasses.dataclass
class LatestGradient:
    """What is known of the latest step's gradient."""

    #: Of everything trained, before it is cut.
    norm: float = 0.0


class DivergenceCallback(TrainerCallback):
    """Ends a run whose loss, gradient or adapter is no number any more."""

    def __init__(self, loss: TaskLoss[Any], gradient: LatestGradient) -> None:
        self._loss = loss
        self._gradient = gradient

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss and the gradient of this step."""
        self._expect(self._loss.training.is_finite, "training loss", step=state.global_step + 1)
        self._expect(math.isfinite(self._gradient.norm), "gradient", step=state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The adapter, its head included, that this step wrote."""
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        largest = nn.utils.get_total_norm(trained, norm_type=math.inf)
        self._expect(bool(largest.isfinite()), "adapter", step=state.global_step)

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
        self,
        observer: TrainingObserver,
        *,
        loss: TaskLoss[Any],
        gradient: LatestGradient,
        reinit: ReinitialiseCallback,
        clock: RunClock,
    ) -> None:
        self._observer = observer
        self._loss = loss
        self._gradient = gradient
        self._reinit = reinit
        self._clock = clock
        self._learning_rate = 0.0
        self._train_metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """The latest step's loss and quality, and the hits, as an evaluation has them."""
        return _prefixed("train_", self._train_metrics) | self._reinit.metrics()

    def state(self) -> Json:
        """The latest step's loss and quality."""
        return {"train_metrics": self._train_metrics}

    def restore(self, state: Json) -> None:
        """Take another step's for the latest."""
        self._train_metrics = state["train_metrics"]

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
        train = self._train_metrics = merged(self._loss.training).metrics()
        self._observer.on_step(
            StepMetrics(
                step=state.global_step,
                total_steps=state.max_steps,
                train_loss=train["loss"],
                train_mean_token_accuracy=train.get("mean_token_accuracy"),
                learning_rate=self._learning_rate,
                gradient_norm=self._gradient.norm,
                tokens_per_second=self._clock.per_second(state.num_input_tokens_seen),
                seconds_left=self._clock.seconds_left(state.max_steps - state.global_step),
                hits=self._reinit.hits,
                trained_tokens=state.num_input_tokens_seen,
            )
        )


class Best:
    """The evaluation with the lowest validation loss, and how many there were since."""

    def __init__(self, *, min_delta: float, patience: int | None, keep: bool) -> None:
        self._min_delta = min_delta
        self._patience = patience
        self._keep = keep
        self._loss: float | None = None
        self._without_better = 0
        #: Of the lowest loss so far; None without a validation set.
        self.step: int | None = None
        #: It itself, if it is to be kept.
        self.evaluation: Evaluation | None = None

    @property
    def is_patience_over(self) -> bool:
        """Whether the run should end."""
        return self._patience is not None and self._without_better >= self._patience

    def consider(self, evaluation: Evaluation) -> None:
        """Compare one more evaluation on a validation set."""
        loss = evaluation.metrics["valid_loss"]
        is_better = self._loss is None or loss < self._loss - self._min_delta
        self._without_better = 0 if is_better else self._without_better + 1
        if self._loss is None or loss < self._loss:
            self._loss, self.step = loss, evaluation.step
            self.evaluation = evaluation if self._keep else None

    def state(self) -> Json:
        """The losses so far; the evaluation itself is stored apart."""
        return {"step": self.step, "loss": self._loss, "without_better": self._without_better}

    def restore(self, state: Json) -> None:
        """Go on comparing from there."""
        self.step, self._loss, self._without_better = state["step"], state["loss"], state["without_better"]


class EvaluationCallback(TrainerCallback):
    """Evaluates after some steps, and hands the adapter to the observer."""

    def __init__(
        self,
        observer: TrainingObserver,
        *,
        steps: frozenset[int],
        progress: ProgressCallback,
        best: Best,
        loss: TaskLoss[Any],
        clock: RunClock,
        has_validation: bool,
        export: Callable[[dict[str, float]], bytes],
    ) -> None:
        self._observer = observer
        self._steps = steps
        self._progress = progress
        self._best = best
        self._loss = loss
        self._clock = clock
        self._has_validation = has_validation
        self._export = export
        #: The latest, None before the first.
        self.latest: Evaluation | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that goes on where an evaluation was due begins with it (``eval_on_start``)."""
        if state.global_step in self._steps:
            self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer for an evaluation."""
        if state.global_step in self._steps:
            self._begin()
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer has run the model over the validation set, if there is one."""
        valid = _prefixed("valid_", self._loss.validation.metrics()) if self._has_validation else {}
        metrics = {"step": float(state.global_step), **self._progress.metrics(), **valid, **_prefixed("full_", valid)}
        self.latest = Evaluation(state.global_step, metrics, self._export(metrics))
        self._clock.evaluation_ends()
        self._observer.on_evaluation(self.latest)
        if self._has_validation:
            self._best.consider(self.latest)
            control.should_training_stop |= self._best.is_patience_over

    def _begin(self) -> None:
        self._clock.evaluation_begins()
        self._loss.reset_validation()


class StateCallback(TrainerCallback):
    """Hands the observer the state of the run: every few steps, before evaluations, and on demand."""

    def __init__(
        self,
        observer: TrainingObserver,
        *,
        run: Json,
        every: int,
        evaluation_steps: frozenset[int],
        parts: Mapping[str, Resumable],
        best: Best,
        handed_over: int = 0,
    ) -> None:
        self._observer = observer
        self._run = run
        self._every = every
        self._evaluation_steps = evaluation_steps
        self._parts = parts
        self._best = best
        self._handed_over = handed_over
        self._model: dict[str, Tensor] = {}
        self._latest: RunState | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what changes in the model; it stays where it is."""
        self._model = changing_tensors(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer is about to write over the latest state."""
        self._latest = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the state."""
        self._latest = RunState(
            run=self._run,
            trainer=dataclasses.asdict(dataclasses.replace(state, log_history=[])),
            model=self._model,
            optimizer=kwargs["optimizer"].state_dict(),
            scheduler=kwargs["lr_scheduler"].state_dict(),
            rng=RngState.capture(),
            parts={name: part.state() for name, part in self._parts.items()},
            best=self._best.evaluation,
        )
        if state.global_step % self._every == 0 or state.global_step in self._evaluation_steps:
            self.hand_over()

    def hand_over(self) -> None:
        """Give the observer the latest state, unless it has it or the optimizer has begun to write over it."""
        if self._latest is not None and self._latest.step > self._handed_over:
            self._observer.on_state(self._latest.step, dumps(self._latest))
            self._handed_over = self._latest.step


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

    def state(self) -> Json:
        """The times so far."""
        return {
            "in_steps": self._in_steps,
            "steps": self._steps,
            "last_evaluation": self._last_evaluation,
            "evaluations_left": self._evaluations_left,
        }

    def restore(self, state: Json) -> None:
        """Go on from there."""
        self._in_steps, self._steps = state["in_steps"], state["steps"]
        self._last_evaluation, self._evaluations_left = state["last_evaluation"], state["evaluations_left"]
