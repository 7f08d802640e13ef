"""Sizes of a base model and an adapter on it, without their weights."""

from __future__ import annotations

from uora import layout, targets
from uora.artifact import stored_bytes
from uora.data import DatasetReport
from uora.estimate import FREE, Footprint, Prices, Sizes, estimate, measured_costs
from uora.layout import trainable_parameters
from uora.models import LocalModel, load_skeleton
from uora.spec import AdapterSpec, Task, TrainingSpec
from uora.training.batches import MAX_TOKENS_AT_ONCE

#: A trained number, its gradient and Adam's two moments.
_NUMBERS_OF_TRAINED = 4


def footprint(base: LocalModel, adapter: AdapterSpec, task: Task) -> Footprint:
    """What an estimate needs to know beside the rows.

    Raises:
        As `measure` does.
    """
    modules = list(targets.find(load_skeleton(base, task=task), adapter.targets).values())
    return Footprint(
        sizes=measure(base, adapter, task),
        tokens_at_once=MAX_TOKENS_AT_ONCE["cpu"],
        trainable_parameters=trainable_parameters(adapter, modules),
        adapter_bytes=stored_bytes(adapter, modules),
    )


def with_estimate(
    report: DatasetReport, spec: TrainingSpec, base: LocalModel, *, prices: Prices = FREE
) -> DatasetReport:
    """The report on a training file, and what training on it as ``spec`` says would take on a CPU.

    Raises:
        As `measure` does.
    """
    sizes = measure(base, spec.adapter, spec.task)
    found = estimate(
        spec,
        sizes,
        report,
        tokens_at_once=MAX_TOKENS_AT_ONCE["cpu"],
        costs=measured_costs(),
        prices=prices,
    )
    return report.model_copy(update={"estimate": found})


def measure(base: LocalModel, adapter: AdapterSpec, task: Task) -> Sizes:
    """What `uora.estimate.estimate` needs to know of the models.

    Raises:
        BaseModelError: the base model's configuration cannot be read.
        TargetError: a target names no module.
        UnsupportedLayerError: a target is of a kind that is not adapted.
    """
    skeleton = load_skeleton(base, task=task)
    linear = targets.find(skeleton, "all-linear").values()
    adapted = list(targets.find(skeleton, adapter.targets).values())
    return Sizes(
        linear_parameters=sum(module.in_features * module.out_features for module in linear),
        linear_features=sum(module.in_features + module.out_features for module in linear),
        adapted_features=sum(module.in_features + module.out_features for module in adapted),
        adapted_layers=len(adapted),
        adapter_numbers=_NUMBERS_OF_TRAINED * trainable_parameters(adapter, adapted)
        + sum(key.r * key.n for key in layout.frame_keys(adapter, adapted)),
        vocabulary=getattr(skeleton.config, "vocab_size", 0),
        hidden=getattr(skeleton.config, "hidden_size", 0),
    )
