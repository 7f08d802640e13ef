"""Adapters onto base models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

from uora import targets
from uora.errors import ShapeError
from uora.layout import ModuleShape
from uora.memory import check_memory
from uora.methods.kinds import method_of
from uora.quantised import keep_weight_layout
from uora.spec import AdapterSpec
from uora.svd import BaseWeights
from uora.tuner._peft import BaseTunerLayer


def attach(
    model: nn.Module | PeftModel,
    spec: AdapterSpec,
    *,
    base: BaseWeights,
    adapter_name: str = "default",
    head: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Put a new, trainable adapter on a base model, or beside the adapters of the same method on a PeftModel.

    Args:
        model: the base model; its weights are never changed.
        spec: the adapter.
        base: the base model's own weights.
        adapter_name: PEFT's name for it.
        head: names of modules to train whole and store with the adapter.
        seed: of random starts (lora, the head's copy has its own).

    Raises:
        TargetError, UnsupportedLayerError: as for `uora.targets.find`.
        RankError: there is not enough memory for the rank.
    """
    modules = targets.find(base_model(model), spec.targets, head=head)
    return attach_to(model, spec, list(modules.values()), base=base, adapter_name=adapter_name, head=head, seed=seed)


def attach_to(
    model: nn.Module | PeftModel,
    spec: AdapterSpec,
    modules: Sequence[ModuleShape],
    *,
    base: BaseWeights,
    adapter_name: str,
    head: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """`attach` to exactly these modules."""
    check_memory(spec, modules, device=next(model.parameters()).device)
    keep_weight_layout(model)
    method = method_of(spec)
    config = cast(Any, method.config(base))
    config.target_modules = {module.name for module in modules}
    config.modules_to_save = list(head) or None
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 reads it
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it right for Conv1D
        torch.manual_seed(seed)
        peft_model = _inject(model, config, adapter_name)
    layers = adapted_layers(peft_model, adapter_name)
    if list(layers) != [module.name for module in modules]:
        raise ShapeError(f"PEFT adapted {sorted(layers)}, expected {sorted(module.name for module in modules)}.")
    method.prepare(peft_model, layers, adapter_name, base)
    return peft_model


def _inject(model: nn.Module | PeftModel, config: PeftConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=adapter_name))
    with _own_matrices(model, config, adapter_name) if isinstance(config, VeraConfig) else nullcontext():
        model.add_adapter(adapter_name, config)
    return model


@contextmanager
def _own_matrices(model: PeftModel, config: VeraConfig, adapter_name: str) -> Iterator[None]:
    """Keep the layers' own matrices while PEFT adds another VeRA adapter.

    PEFT would have every adapter use the first one's; the new adapter's come in `_Vera.prepare`.
    """
    tuner = cast(Any, model.base_model)
    layers: list[Any] = [layer for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)]
    own = [(layer, layer.vera_A, layer.vera_B) for layer in layers]
    nothing = torch.zeros(())
    tuner.vera_A[adapter_name] = nothing.expand(config.r, max(layer.in_features for layer in layers))
    tuner.vera_B[adapter_name] = nothing.expand(max(layer.out_features for layer in layers), config.r)
    yield
    for layer, a, b in own:
        layer.vera_A, layer.vera_B = a, b


def adapted_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, Any]:
    """The layers that an adapter is on, by their names in the base model, in the model's order."""
    return {
        name: layer
        for name, layer in base_model(model).named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, layer.adapter_layer_names[0])
    }


def base_model(model: nn.Module) -> nn.Module:
    """The base model of a PeftModel, with the adapters' layers in it; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
