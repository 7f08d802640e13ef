"""What a training run tells its caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: from 1.
        total_steps: of the whole run.
        train_loss: mean over this step's batch: nats per learned token, nats per row of a classification, squared
            error per row of a regression.
        train_mean_token_accuracy: share of the learned tokens that the model ranked first, 0..1; None for tasks that
            learn no tokens.
        learning_rate: that this step was made with; a head has its own.
        gradient_norm: of everything trained, before it is cut.
        tokens_per_second: ``trained_tokens`` over the time spent in steps so far.
        seconds_left: estimate for the rest of the run, evaluations included once one has been seen.
        hits: reinitialisation hits of the run so far; 0 for other methods than UORA.
        trained_tokens: of the run so far: all tokens but padding, prompts included, counted again in every epoch. 0 for
            images.
    """

    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float | None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds_left: float
    hits: int
    trained_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """The adapter as it was after ``step``.

    ``metrics`` are those of the fine-tuning API's checkpoints: ``step``, ``train_loss`` and
    ``train_mean_token_accuracy`` of that step's batch; with a validation set also ``valid_loss``,
    ``valid_mean_token_accuracy`` and the same with ``full_`` before them. Each evaluation goes over the whole set,
    so the two are equal. A classification has ``accuracy`` and a regression ``pearson`` (Pearson's correlation) where
    tokens have ``mean_token_accuracy``. UORA also has ``hits``, as in `StepMetrics`.
    """

    step: int
    metrics: dict[str, float]
    artifact: bytes


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        artifact: the adapter of the last evaluation, which is made after the last step; with
            ``load_best_model_at_end``, of the one with the lowest validation loss.
        trained_tokens: as in `StepMetrics`.
        steps: optimizer steps made.
        hits: as in `StepMetrics`.
        metrics: of the evaluation that ``artifact`` is of.
        stopped_early: whether the validation loss ended the run before its last step.
        best_step: of the evaluation with the lowest validation loss; None without a validation set.
    """

    artifact: bytes
    trained_tokens: int
    steps: int
    hits: int
    metrics: dict[str, float]
    stopped_early: bool = False
    best_step: int | None = None


class TrainingObserver(Protocol):
    """The caller's side of a run. Its methods are called in the thread that trains, so they should be quick."""

    def on_start(self, total_steps: int) -> None:
        """Data and model are ready; the first step comes next."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step was made."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The adapter was evaluated; its artifact can be kept as a checkpoint."""

    def on_state(self, step: int, state: bytes) -> None:
        """Everything that another process needs to go on after ``step``: the ``resume`` of `train`."""

    def should_stop(self) -> bool:
        """Asked after every step and every batch of an evaluation.

        True ends the run with `TrainingStopped`; before that, ``on_state`` is given the latest step's state.
        """


class TrainingStopped(Exception):
    """``should_stop`` answered True."""
