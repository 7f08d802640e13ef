"""What each task makes small, and the numbers that tell how well it is done."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from uora.data import IGNORED, Scale


class Meter(ABC):
    """Sums over what was predicted so far: tokens, or rows."""

    def __init__(self) -> None:
        self.loss_sum = 0.0
        self.count = 0

    @property
    def mean_loss(self) -> float:
        """The loss per prediction."""
        return self.loss_sum / self.count

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss_sum)

    def add(self, predictions: Tensor, targets: Tensor, loss_sum: Tensor) -> None:
        """Count one batch: predictions ``(n, ...)``, targets ``(n,)`` and the sum of their losses."""
        self.loss_sum += loss_sum.item()
        self.count += len(targets)

    def merge(self, other: Self) -> None:
        """Count what another meter has counted."""
        self.loss_sum += other.loss_sum
        self.count += other.count

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """``loss`` and how good the predictions are."""


class AccuracyMeter(Meter):
    """Counts predictions whose likeliest class is the target."""

    name = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.correct = 0

    @property
    def accuracy(self) -> float:
        """Share of targets that the model ranked first."""
        return self.correct / self.count

    def add(self, predictions: Tensor, targets: Tensor, loss_sum: Tensor) -> None:
        """Count one batch: logits ``(n, classes)``, targets ``(n,)``."""
        super().add(predictions, targets, loss_sum)
        self.correct += int((predictions.argmax(dim=-1) == targets).sum())

    def merge(self, other: Self) -> None:
        """Count what another meter has counted."""
        super().merge(other)
        self.correct += other.correct

    def metrics(self) -> dict[str, float]:
        """``loss`` in nats, and the share of right predictions."""
        return {"loss": self.mean_loss, self.name: self.accuracy}


class TokenMeter(AccuracyMeter):
    """The same per learned token."""

    name = "mean_token_accuracy"


class NumberMeter(Meter):
    """Keeps predicted numbers with their targets."""

    def __init__(self) -> None:
        super().__init__()
        self._predictions: list[float] = []
        self._targets: list[float] = []

    def add(self, predictions: Tensor, targets: Tensor, loss_sum: Tensor) -> None:
        """Count one batch: predictions ``(n,)``, targets ``(n,)``."""
        super().add(predictions, targets, loss_sum)
        self._predictions += predictions.tolist()
        self._targets += targets.tolist()

    def merge(self, other: Self) -> None:
        """Count what another meter has counted."""
        super().merge(other)
        self._predictions += other._predictions
        self._targets += other._targets

    @property
    def pearson(self) -> float:
        """Pearson's correlation, -1..1; 0 where all predictions or all targets are the same."""
        try:
            return statistics.correlation(self._predictions, self._targets)
        except statistics.StatisticsError:
            return 0.0

    def metrics(self) -> dict[str, float]:
        """``loss``, the mean squared error, and ``pearson``."""
        return {"loss": self.mean_loss, "pearson": self.pearson}


MeterT = TypeVar("MeterT", bound=Meter)


class TaskLoss(ABC, Generic[MeterT]):
    """``compute_loss_func`` of a Trainer, in float32.

    What it sees with gradients goes into the meter ``training``, the rest into ``validation``.
    """

    def __init__(self, meter: Callable[[], MeterT]) -> None:
        self._meter = meter
        self.training = meter()
        self.validation = meter()

    def reset_training(self) -> None:
        """Forget what was seen with gradients."""
        self.training = self._meter()

    def reset_validation(self) -> None:
        """Forget the rest."""
        self.validation = self._meter()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within the context, nothing that is seen is counted."""
        counted = self.training, self.validation
        self.training, self.validation = self._meter(), self._meter()
        try:
            yield
        finally:
            self.training, self.validation = counted

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The sum of losses over ``num_items_in_batch``, the `count` of the whole optimizer step.

        Args:
            outputs: of the model, with ``logits``.
            labels: as collated.
            num_items_in_batch: None for these labels' own.
        """
        predictions, targets = self._select(outputs.logits.float(), labels.to(outputs.logits.device))
        loss_sum = self._loss_sum(predictions, targets)
        meter = self.training if torch.is_grad_enabled() else self.validation
        meter.add(predictions.detach(), targets, loss_sum.detach())
        return loss_sum / (len(targets) if num_items_in_batch is None else num_items_in_batch)

    def count(self, labels: Tensor) -> int:
        """How many predictions the labels ask for."""
        return len(labels)

    @abstractmethod
    def _select(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions that count ``(n, ...)`` and their targets ``(n,)``."""

    @abstractmethod
    def _loss_sum(self, predictions: Tensor, targets: Tensor) -> Tensor: ...


class LearnedTokenLoss(TaskLoss[TokenMeter]):
    """Cross entropy of the learned tokens.

    Takes the logits of all positions ``(rows, length, vocabulary)`` or of the learned ones only
    ``(n, vocabulary)``; labels ``(rows, length)``.
    """

    def __init__(self) -> None:
        super().__init__(TokenMeter)

    def count(self, labels: Tensor) -> int:
        """Learned tokens. The first of a row has nothing before it to be predicted from."""
        return int((labels[:, 1:] != IGNORED).sum())

    def _select(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dim() == 3:
            logits = logits[predicting_positions(labels)]
        return logits, labels[:, 1:][labels[:, 1:] != IGNORED]

    def _loss_sum(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions, targets, reduction="sum")


class ClassLoss(TaskLoss[AccuracyMeter]):
    """Cross entropy of the classes: logits ``(rows, classes)``, labels ``(rows,)``."""

    def __init__(self) -> None:
        super().__init__(AccuracyMeter)

    def _select(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits, labels

    def _loss_sum(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions, targets, reduction="sum")


class SquaredErrorLoss(TaskLoss[NumberMeter]):
    """Squared error of a number: logits ``(rows, 1)``, labels ``(rows,)``.

    The model learns the numbers on a scale of mean 0 and deviation 1, which is where a head starts: numbers as they are
    would keep it busy with their mean. The meters count in the labels' units.
    """

    def __init__(self, scale: Scale) -> None:
        super().__init__(NumberMeter)
        self._scale = scale

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As for any task, in units of the deviation."""
        return super().__call__(outputs, labels, num_items_in_batch) / self._scale.deviation**2

    def _select(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._scale.mean + self._scale.deviation * logits.squeeze(-1), labels

    def _loss_sum(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(predictions, targets, reduction="sum")


def predicting_positions(labels: Tensor) -> Tensor:
    """Mask ``(rows, length)`` of the positions whose next token is learned."""
    learned_next = labels[:, 1:] != IGNORED
    return functional.pad(learned_next, (0, 1), value=False)


@torch.no_grad()
def keeps_masked_logits(model: nn.Module) -> bool:
    """Whether the model computes logits for a boolean mask of positions only, tried on two tokens.

    For a short answer to a long prompt, most of a small model's time would go into logits that nobody reads.
    """
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    mask = torch.tensor([[True, False]], device=ids.device)
    try:
        logits = model(input_ids=ids, logits_to_keep=mask).logits
    except (TypeError, IndexError, RuntimeError):  # how models without it take a mask
        return False
    return bool(logits.dim() == 2 and logits.shape[0] == 1)
