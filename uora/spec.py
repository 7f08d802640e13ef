"""What to train, as values: parsed once, frozen, without torch.

``HyperparameterRequest`` is what a client asks for, ``"auto"`` included; ``resolve`` turns it into the
numbers that are run, once the number of examples is known.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]

#: Learning rate of multiplier 1 for the vectors of a UORA adapter on all linear layers: 1e-2 had not
#: converged after 60 steps of 16 chat rows on SmolLM2-135M-Instruct where 5e-2 had.
BASE_LEARNING_RATE = 5e-2


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdapterSpec(_Frozen):
    """A UORA adapter before training (arXiv 2505.20154; defaults of the reference code unless noted)."""

    method: Literal["uora"] = "uora"
    #: Rank. The reference code takes 256; 64 on all linear layers is what was measured here.
    r: int = Field(default=64, ge=1, le=4096)
    #: ``all-linear``; ``q,v``, the query and value projections that the reference code adapts; or the last parts of
    #: module names.
    targets: Literal["all-linear", "q,v"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    #: What a hit leaves of a frame's row: ``row = alpha row + (1 - alpha) target row``.
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    #: ``|d[i]| < tau`` counts towards a hit.
    tau: float = Field(default=1e-5, ge=0.0)
    #: Every ``count_k``-th count is a hit.
    count_k: int = Field(default=1, ge=1)
    d_initial: float = 0.1
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    #: Names the frames. Adapters of one base model share them only if they have the same seed.
    frame_seed: int = Field(default=0, ge=0, lt=2**63)


class HyperparameterRequest(_Frozen):
    """Hyperparameters as OpenAI's client sends them."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=1000.0)] = "auto"


class Hyperparameters(_Frozen):
    """Hyperparameters as they are run."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class TrainingSpec(_Frozen):
    """One training run."""

    adapter: AdapterSpec
    hyperparameters: Hyperparameters
    #: Peak learning rate of the linear decay.
    learning_rate: float
    seed: int

    def total_steps(self, n_examples: int) -> int:
        """Optimizer steps of the whole run over ``n_examples`` rows."""
        return math.ceil(n_examples / self.hyperparameters.batch_size) * self.hyperparameters.n_epochs


def resolve(
    request: HyperparameterRequest,
    *,
    adapter: AdapterSpec,
    learning_rate: float | None,
    seed: int,
    n_examples: int,
) -> TrainingSpec:
    """Replace every ``"auto"`` by a number that suits ``n_examples`` training rows.

    Args:
        request: what the client asked for.
        adapter: the adapter to train.
        learning_rate: an absolute rate that replaces the default one before the multiplier; None for the default.
        seed: order of the rows, dropout.
        n_examples: rows of the training file.
    """
    batch_size = max(1, min(16, n_examples // 8)) if request.batch_size == "auto" else request.batch_size
    # "auto" makes about 60 steps, and at most 10 epochs.
    auto_epochs = max(1, min(10, round(60 * batch_size / n_examples)))
    n_epochs = auto_epochs if request.n_epochs == "auto" else request.n_epochs
    multiplier = 1.0 if request.learning_rate_multiplier == "auto" else request.learning_rate_multiplier
    return TrainingSpec(
        adapter=adapter,
        hyperparameters=Hyperparameters(n_epochs=n_epochs, batch_size=batch_size, learning_rate_multiplier=multiplier),
        learning_rate=(BASE_LEARNING_RATE if learning_rate is None else learning_rate) * multiplier,
        seed=seed,
    )
