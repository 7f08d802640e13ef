"""What a training would take, by a model whose coefficients were measured (``benchmarks.scaling``). Free of torch.

Seconds of a step and bytes above the base model are sums of what grows with the work, each times a coefficient that is
not negative: more tokens, a higher rank or more rows in a batch never cost less.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from uora.data.report import DatasetReport, Estimate
from uora.spec import TrainingSpec

#: The file in this package that ``benchmarks.scaling --write`` writes.
COSTS_FILE = "costs.json"


@dataclass(frozen=True)
class Prices:
    """What training costs, in whatever currency."""

    per_second: float = 0.0
    #: Of all epochs.
    per_thousand_tokens: float = 0.0

    def cost(self, *, tokens: int, seconds: float | None) -> float | None:
        """Of a whole run; None where it depends on seconds that are not known."""
        if seconds is None and self.per_second:
            return None
        return self.per_second * (seconds or 0.0) + self.per_thousand_tokens * tokens / 1000


#: Of a service that bills nobody.
FREE = Prices()


@dataclass(frozen=True)
class Sizes:
    """Of a base model and an adapter on it.

    Attributes:
        linear_parameters: of the base model's linear layers, output embeddings left out.
        linear_features: ``in + out`` of these layers, summed.
        adapted_features: the same of the adapted ones.
        adapted_layers: how many there are.
        adapter_numbers: of frames, trained vectors, gradients and moments, float32.
        vocabulary: tokens that there are.
        hidden: features of the output embeddings.
    """

    linear_parameters: int
    linear_features: int
    adapted_features: int
    adapted_layers: int
    adapter_numbers: int
    vocabulary: int
    hidden: int


@dataclass(frozen=True)
class Footprint:
    """What an adapter on a base model is, before it is trained.

    Attributes:
        sizes: that its training takes time and memory for.
        tokens_at_once: that go through the model together.
        trainable_parameters: numbers that are trained, a classifier's head left out.
        adapter_bytes: of the stored adapter, a classifier's head left out.
    """

    sizes: Sizes
    tokens_at_once: int
    trainable_parameters: int
    adapter_bytes: int


@dataclass(frozen=True)
class Work:
    """One optimizer step.

    Attributes:
        sizes: of the models.
        rank: of the adapter.
        tokens: of the step's rows, without padding; a beginning that they share is counted for each.
        learned_tokens: of these.
        row_tokens: of a row, the mean.
        tokens_at_once: that go through the model together, at most.
    """

    sizes: Sizes
    rank: int
    tokens: float
    learned_tokens: float
    row_tokens: float
    tokens_at_once: int

    def seconds_terms(self) -> dict[str, float]:
        """What time grows with."""
        sizes = self.sizes
        return {
            "step": 1.0,
            "adapted_layers": sizes.adapted_layers,
            "base": self.tokens * sizes.linear_parameters,
            "adapter": self.tokens * self.rank * sizes.adapted_features,
            "attention": self.tokens * self.row_tokens * sizes.linear_features,
            "logits": self.learned_tokens * sizes.vocabulary * sizes.hidden,
        }

    def memory_terms(self) -> dict[str, float]:
        """What peak memory above the base model grows with."""
        sizes = self.sizes
        at_once = min(self.tokens, max(self.tokens_at_once, self.row_tokens))
        return {
            "process": 1.0,
            "activations": at_once * sizes.linear_features,
            "adapter_activations": at_once * (self.rank * sizes.adapted_layers + sizes.adapted_features),
            "adapter": sizes.adapter_numbers,
            "logits": self.learned_tokens * at_once / self.tokens * sizes.vocabulary,
        }


@dataclass(frozen=True)
class Costs:
    """Coefficients of the terms of `Work`, and the machine they were measured on."""

    machine: str
    seconds: Mapping[str, float]
    memory: Mapping[str, float]

    def step_seconds(self, work: Work) -> float:
        """Of one optimizer step."""
        return _weighted(self.seconds, work.seconds_terms())

    def memory_bytes(self, work: Work) -> float:
        """At the peak, above what the loaded base model takes."""
        return _weighted(self.memory, work.memory_terms())


def _weighted(coefficients: Mapping[str, float], terms: Mapping[str, float]) -> float:
    return sum(coefficients[name] * value for name, value in terms.items())


@lru_cache(maxsize=1)
def measured_costs() -> Costs | None:
    """The coefficients in this package; None where nobody has measured."""
    file = files("uora").joinpath(COSTS_FILE)
    return Costs(**json.loads(file.read_text())) if file.is_file() else None


def estimate(
    spec: TrainingSpec,
    sizes: Sizes,
    report: DatasetReport,
    *,
    tokens_at_once: int,
    costs: Costs | None,
    prices: Prices = FREE,
) -> Estimate:
    """What training as ``spec`` says on the file of ``report`` would take.

    Gradient checkpointing, evaluations and loading are not counted.

    Args:
        spec: what is run.
        sizes: of its base model and adapter.
        report: on the training file.
        tokens_at_once: that go through the model together.
        costs: coefficients; None for an estimate of the tokens alone.
        prices: what a second and tokens cost.
    """
    rows, tokens = report.rows_usable, report.tokens * spec.hyperparameters.n_epochs
    if costs is None or not report.tokens:  # images have no tokens, and are not measured
        cost = prices.cost(tokens=tokens, seconds=None)
        return Estimate(tokens=tokens, seconds=None, memory_bytes=None, cost=cost)
    rows_of_step = min(rows, spec.hyperparameters.batch_size * spec.options.gradient_accumulation_steps)
    work = Work(
        sizes=sizes,
        rank=spec.adapter.r,
        tokens=report.tokens / rows * rows_of_step,
        learned_tokens=report.learned_tokens / rows * rows_of_step,
        row_tokens=report.tokens / rows,
        tokens_at_once=tokens_at_once,
    )
    seconds = costs.step_seconds(work) * spec.total_steps(rows)
    return Estimate(
        tokens=tokens,
        seconds=seconds,
        memory_bytes=round(costs.memory_bytes(work)),
        machine=costs.machine,
        cost=prices.cost(tokens=tokens, seconds=seconds),
    )
