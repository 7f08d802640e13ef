"""Adapters to their stored form and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from uora import layout, targets
from uora.artifact import HEAD, Artifact, Manifest, Provenance, dumps
from uora.errors import ShapeError
from uora.frames import check_fingerprint, fingerprint
from uora.layout import ModuleShape
from uora.methods.attaching import adapted_layers, attach_to, base_model
from uora.methods.kinds import method_of
from uora.spec import AdapterSpec, OsoraSpec, Task, UoraSpec
from uora.svd import BaseWeights
from uora.tuner import UoraModel


def adapter_fingerprint(spec: AdapterSpec, modules: Sequence[ModuleShape], base: BaseWeights) -> dict[str, list[float]]:
    """Probes of what an adapter shares with others on this machine: frames, singular vectors, or nothing."""
    if isinstance(spec, OsoraSpec):
        return base.fingerprint([module.name for module in modules], spec.r)
    return fingerprint(layout.frame_keys(spec, modules), base.cache_dir)


def export_artifact(
    model: PeftModel,
    spec: AdapterSpec,
    *,
    base: BaseWeights,
    provenance: Provenance,
    task: Task = "chat",
    labels: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    adapter_name: str = "default",
) -> bytes:
    """An adapter as it is now, in its stored form.

    Raises:
        NonFiniteError: the training diverged.
    """
    method, layers = method_of(spec), adapted_layers(model, adapter_name)
    modules = tuple(_shape(name, layer) for name, layer in layers.items())
    parts = [
        {name: _array(tensor) for name, tensor in method.parameters(layer, adapter_name).items()}
        for layer in layers.values()
    ]
    tensors = layout.pack(spec, parts)
    if isinstance(spec, UoraSpec):
        tensors["hits"] = _hits(model, adapter_name).cpu().numpy().astype(np.int32)
    head = {name: _array(tensor) for name, tensor in _head(model, adapter_name).items()}
    manifest = Manifest.of(
        provenance,
        adapter=spec,
        task=task,
        modules=modules,
        fingerprint=adapter_fingerprint(spec, modules, base),
        labels=tuple(labels),
        head={name: tensor.shape for name, tensor in head.items()},
        metrics=dict(metrics or {}),
    )
    return dumps(Artifact(manifest, tensors | {HEAD + name: tensor for name, tensor in head.items()}))


def _shape(name: str, layer: Any) -> ModuleShape:
    return ModuleShape(name=name, in_features=layer.in_features, out_features=layer.out_features)


def _array(tensor: Tensor) -> layout.Array:
    # A copy: training goes on, and on a CPU the array would share the parameter's memory.
    return np.array(tensor.detach().float().cpu().numpy())


def _hits(model: PeftModel, adapter_name: str) -> Tensor:
    hits: Tensor = cast(UoraModel, model.base_model).uora_hits[adapter_name]
    return hits


def _head(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Parameters and buffers of the modules that were trained whole, by their names in the base model."""
    return {
        f"{name}.{key}": tensor
        for name, module in base_model(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items()
    }


def load_artifact(
    model: nn.Module | PeftModel, artifact: Artifact, *, base: BaseWeights, adapter_name: str = "default"
) -> PeftModel:
    """Put a stored adapter on a base model, or beside the adapters of a PeftModel, trainable as it was.

    Raises:
        FingerprintError: the frames or singular vectors built here are not those it was trained on.
        ShapeError: the model has no such modules, or of other sizes.
    """
    manifest = artifact.manifest
    _check(base_model(model), manifest, base)
    head = sorted({name.rpartition(".")[0] for name in manifest.head})
    peft_model = attach_to(model, manifest.adapter, manifest.modules, base=base, adapter_name=adapter_name, head=head)
    _restore(peft_model, artifact, adapter_name)
    return peft_model


def restore_artifact(model: PeftModel, artifact: Artifact, *, base: BaseWeights, adapter_name: str = "default") -> None:
    """Write a stored adapter's numbers over those of an adapter of the same kind that is on the model.

    Raises:
        FingerprintError, ShapeError: as for `load_artifact`.
    """
    _check(base_model(model), artifact.manifest, base)
    _restore(model, artifact, adapter_name)


def _check(model: nn.Module, manifest: Manifest, base: BaseWeights) -> None:
    check_modules(targets.linears(model), manifest)
    found = adapter_fingerprint(manifest.adapter, manifest.modules, base)
    check_fingerprint(manifest.fingerprint, found)


def check_modules(existing: Mapping[str, ModuleShape], manifest: Manifest) -> None:
    """Make sure that a base model has an adapter's modules; ``existing`` are its `targets.linears`.

    Raises:
        ShapeError: it has not, or of other sizes.
    """
    for module in manifest.modules:
        found = existing.get(module.name)
        if found != module:
            raise ShapeError(
                f"Module {module.name}: the adapter was trained on (in, out) = "
                f"{(module.in_features, module.out_features)}, the base model has "
                f"{(found.in_features, found.out_features) if found else 'no such linear layer'}."
            )


@torch.no_grad()
def _restore(model: PeftModel, artifact: Artifact, adapter_name: str) -> None:
    method, layers = method_of(artifact.manifest.adapter), adapted_layers(model, adapter_name)
    for module, parts in artifact.parts():
        for name, parameter in method.parameters(layers[module.name], adapter_name).items():
            parameter.copy_(torch.from_numpy(np.array(parts[name])))
    if isinstance(artifact.manifest.adapter, UoraSpec):
        _hits(model, adapter_name).copy_(torch.from_numpy(artifact.tensors["hits"].astype(np.int64)))
    stored = artifact.head()
    for name, parameter in _head(model, adapter_name).items():
        parameter.copy_(torch.from_numpy(np.array(stored[name])))
