"""Between a PEFT model with UORA adapters and the stored artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from uora.artifact import Artifact, Manifest, Provenance, dumps
from uora.errors import ShapeError
from uora.layout import ModuleShape
from uora.spec import UoraSpec
from uora.tuner.config import UoraConfig
from uora.tuner.model import UoraModel


def _tuner(model: PeftModel) -> UoraModel:
    if not isinstance(model.base_model, UoraModel):
        raise TypeError(f"expected a PeftModel with UORA adapters, found {type(model.base_model).__name__}")
    return model.base_model


def export_artifact(
    model: PeftModel,
    adapter_name: str = "default",
    *,
    provenance: Provenance,
    metrics: dict[str, float] | None = None,
) -> bytes:
    """The adapter as it is now, in its stored form.

    Raises:
        ShapeError: the vectors are not finite.
    """
    tuner = _tuner(model)
    config = tuner.config_of(adapter_name)
    layers = tuner.adapter_layers(adapter_name)
    manifest = Manifest.of(
        provenance,
        # PEFT has replaced "all-linear" by every name; the last parts say as much in a line.
        adapter=config.spec(targets=tuple(sorted({name.rpartition(".")[2] for name in layers}))),
        modules=tuple(
            ModuleShape(name=name, in_features=layer.in_features, out_features=layer.out_features)
            for name, layer in layers.items()
        ),
        fingerprint=config.frame_fingerprint,
        metrics=metrics or {},
    )
    d = torch.stack([layer.uora_lambda_d[adapter_name].detach().float().cpu() for layer in layers.values()])
    b = torch.cat([layer.uora_lambda_b[adapter_name].detach().float().cpu() for layer in layers.values()])
    hits = tuner.uora_hits[adapter_name].cpu().numpy().astype(np.int32)
    return dumps(Artifact(manifest, {"d": d.numpy(), "b": b.numpy(), "hits": hits}))


def load_artifact(
    model: nn.Module | PeftModel,
    artifact: Artifact,
    adapter_name: str = "default",
    *,
    frame_cache_dir: Path | None = None,
) -> PeftModel:
    """Put a stored adapter on a base model (or beside the adapters of a PeftModel), trainable as before.

    Raises:
        FingerprintError: the frames built here are not those it was trained on.
        ShapeError: the model has no such modules, or of other sizes.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_modules(base, artifact.manifest)
    config = _config_of(artifact.manifest, frame_cache_dir)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        peft_model = model
    else:
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    _copy_vectors(_tuner(peft_model), artifact, adapter_name)
    return peft_model


def _config_of(manifest: Manifest, frame_cache_dir: Path | None) -> UoraConfig:
    if not isinstance(manifest.adapter, UoraSpec):
        raise TypeError(f"expected an adapter of uora, found {manifest.adapter.method}")
    names = [module.name for module in manifest.modules]
    config = UoraConfig.of(manifest.adapter, target_modules=names, frame_cache_dir=frame_cache_dir)
    config.frame_fingerprint = dict(manifest.fingerprint)
    return config


def _check_modules(base: nn.Module, manifest: Manifest) -> None:
    existing = dict(base.named_modules())
    for module in manifest.modules:
        found = existing.get(module.name)
        if found is None:
            raise ShapeError(f"The adapter adapts {module.name}, which this base model does not have.")
        inner = found.get_base_layer() if hasattr(found, "get_base_layer") else found
        weight = getattr(inner, "weight", None)
        shape = (module.out_features, module.in_features)
        if weight is None or tuple(weight.shape) not in (shape, shape[::-1]):
            raise ShapeError(
                f"Module {module.name}: the adapter was trained on (out, in) = {shape}, the base model has "
                f"{None if weight is None else tuple(weight.shape)}."
            )


@torch.no_grad()
def _copy_vectors(tuner: UoraModel, artifact: Artifact, adapter_name: str) -> None:
    layers = tuner.adapter_layers(adapter_name)
    for module, own in artifact.parts():
        layers[module.name].uora_lambda_d[adapter_name].copy_(torch.from_numpy(own["d"].copy()))
        layers[module.name].uora_lambda_b[adapter_name].copy_(torch.from_numpy(own["b"].copy()))
    tuner.uora_hits[adapter_name].copy_(torch.from_numpy(artifact.tensors["hits"].astype(np.int64)))
