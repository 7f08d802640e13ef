"""The loss on learned tokens, with logits computed for these alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from uora.data import IGNORED


@dataclass
class TokenMeter:
    """Sums over learned tokens: their loss in nats, how many the model ranked first, how many there were."""

    loss_sum: float = 0.0
    correct: int = 0
    tokens: int = 0

    @property
    def mean_loss(self) -> float:
        """Nats per learned token."""
        return self.loss_sum / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of learned tokens that the model ranked first."""
        return self.correct / self.tokens

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss_sum)

    def add(self, logits: Tensor, targets: Tensor, loss_sum: Tensor) -> None:
        """Count one batch: logits ``(n, vocabulary)``, targets ``(n,)`` and the sum of their losses."""
        self.loss_sum += loss_sum.item()
        self.correct += int((logits.argmax(dim=-1) == targets).sum())
        self.tokens += len(targets)

    def reset(self) -> None:
        """Forget all."""
        self.loss_sum, self.correct, self.tokens = 0.0, 0, 0


class LearnedTokenLoss:
    """``compute_loss_func`` of a Trainer: cross entropy of the learned tokens, in float32.

    Takes the logits of all positions ``(rows, length, vocabulary)`` or of the learned ones only
    ``(n, vocabulary)``. What it sees with gradients goes into ``training``, the rest into ``validation``.
    """

    def __init__(self) -> None:
        self.training = TokenMeter()
        self.validation = TokenMeter()

    def __call__(
        self, outputs: CausalLMOutputWithPast, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The sum of losses over ``num_items_in_batch``, the learned tokens of the whole optimizer step."""
        assert outputs.logits is not None  # noqa: S101 - only the type says that it could be
        logits = outputs.logits.float()
        if logits.dim() == 3:
            logits = logits[predicting_positions(labels)]
        targets = labels[:, 1:][labels[:, 1:] != IGNORED].to(logits.device)
        loss_sum = functional.cross_entropy(logits, targets, reduction="sum")
        meter = self.training if torch.is_grad_enabled() else self.validation
        meter.add(logits.detach(), targets, loss_sum.detach())
        return loss_sum / (len(targets) if num_items_in_batch is None else num_items_in_batch)


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
