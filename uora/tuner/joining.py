"""Models that are trained together: each has its own adapter, all have the same base model and one forward.

The base model's weights are in memory once. Every model is a `PeftModel` of its own with its own vectors, optimizer and
so on; a further one, the lead, has the forward: in its layers each token is given the update of its own model's
adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

from peft import PeftModel
from torch import nn

from uora.tuner.additive import AdditiveLinear
from uora.tuner.rows import Joint, MixedBatchModel

Model = TypeVar("Model", bound=nn.Module)


def copy_structure(model: Model) -> Model:
    """A copy with trained parameters of its own; frozen ones and buffers are the very tensors of ``model``."""
    shared: dict[int, object] = {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


class JointModel:
    """The lead of several models, which have adapters of one method on the same layers."""

    def __init__(self, models: Mapping[int, PeftModel]) -> None:
        """The lead of models that are known by numbers."""
        self.lead = copy_structure(next(iter(models.values())))
        layers = {number: dict(_layers(model)) for number, model in models.items()}
        for name, layer in _layers(self.lead):
            layer.requires_grad_(False)
            layer.members = {number: own[name] for number, own in layers.items()}

    @contextmanager
    def forward_of(self, tokens: Mapping[int, int]) -> Iterator[PeftModel]:
        """The lead, for a forward over so many tokens of each model, by the models' numbers and in their order."""
        rows = cast(MixedBatchModel, self.lead.base_model)._rows
        rows.joint = Joint.of(tokens, device=self.lead.device)
        try:
            yield self.lead.train()
        finally:
            rows.joint = None


def _layers(model: PeftModel) -> Iterator[tuple[str, AdditiveLinear]]:
    """The adapted layers by their names in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, AdditiveLinear):
            yield name, module
