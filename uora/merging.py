"""A fine-tuned model as a transformers directory of its own, without an adapter: what any server loads."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from uora import targets
from uora.artifact import Artifact, Manifest
from uora.convert import pairs, scale
from uora.errors import ArtifactError, ExportError, NonFiniteError
from uora.folders import new_folder
from uora.methods import check_modules
from uora.models import LocalModel, load_model
from uora.models.logs import quiet
from uora.models.mapped import stored_dtype
from uora.models.sources import MODEL_FILES, RECORD
from uora.svd import BaseWeights

#: Of the base model's files, those that are not copied: its weights, their index, and our own note.
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", RECORD)


def write_merged(
    artifact: Artifact,
    directory: Path,
    *,
    local: LocalModel,
    dtype: torch.dtype | None = None,
    cache_dir: Path | None = None,
) -> None:
    """Write the base model with the adapter's update in its weights, as transformers' ``save_pretrained`` does.

    An update is added in float32 and the sum rounded once. The model is held in memory in its stored dtype.

    Args:
        artifact: a verified adapter.
        directory: new or empty; nothing is there until all is.
        local: the base model that the adapter was trained on.
        dtype: of the weights, a head's included; None for `merged_dtype`.
        cache_dir: disk cache of frames and singular factors.

    Raises:
        ArtifactError: the adapter belongs to another base model, or its frames cannot be built here.
        NonFiniteError: a weight would not be finite in this dtype.
        ExportError: something is in the directory already, or transformers' class has no place for the head.
        BaseModelError: the base model cannot be loaded.
    """
    _check_base(artifact.manifest, local)
    dtype = dtype or merged_dtype(local)
    with new_folder(directory) as scratch:
        model = merge(artifact, local, dtype=dtype, cache_dir=cache_dir)
        for file in local.directory.iterdir():
            if _is_copied(file.name):
                shutil.copyfile(file, scratch / file.name)
        # Over the base model's configuration. Names of weights as in its files, which quantised ones do not have again.
        with quiet():
            model.save_pretrained(scratch, save_original_format=not _is_quantised(local))


def merged_dtype(local: LocalModel) -> torch.dtype:
    """The dtype in which a base model is stored; bfloat16 for a quantised one."""
    return torch.bfloat16 if _is_quantised(local) else stored_dtype(local)


def merge(
    artifact: Artifact, local: LocalModel, *, dtype: torch.dtype, cache_dir: Path | None = None
) -> PreTrainedModel:
    """The model with the adapter's update in its weights, on the CPU; arguments and errors of `write_merged`."""
    manifest = artifact.manifest
    stored = torch.float32 if _is_quantised(local) else stored_dtype(local)
    model = load_model(local, dtype=stored, device="cpu", task=manifest.task, labels=manifest.labels)
    if _is_quantised(local):
        with quiet():
            model = cast(PreTrainedModel, cast(Any, model).dequantize())
    check_modules(targets.linears(model), manifest)
    _place_head(model, artifact)
    base = BaseWeights.of_local(local, manifest.task, cache_dir)  # the exact ones, read only if they are needed
    size = scale(artifact)
    for pair in pairs(artifact, base=base, cache_dir=cache_dir):
        update = torch.from_numpy(pair.b) @ torch.from_numpy(pair.a) * (size.alpha / size.rank)
        _add(model, pair.module.name, update, dtype=dtype)
    return cast(PreTrainedModel, cast(Any, model).to(dtype))


def _check_base(manifest: Manifest, local: LocalModel) -> None:
    if manifest.base_digest != local.digest:
        raise ArtifactError(
            f"The adapter was trained on {manifest.base_model!r} with digest {manifest.base_digest[:16]}...; "
            f"{local.name!r} has {local.digest[:16]}.... Use the one that it was trained on."
        )


def _is_quantised(local: LocalModel) -> bool:
    return "quantization_config" in json.loads((local.directory / "config.json").read_text())


def _is_copied(name: str) -> bool:
    return any(fnmatch(name, wanted) for wanted in MODEL_FILES) and not any(
        fnmatch(name, other) for other in _NOT_COPIED
    )


def _add(model: PreTrainedModel, name: str, update: Tensor, *, dtype: torch.dtype) -> None:
    """Give a linear layer a new weight. The old one may be mapped from a file, or tied to another layer's."""
    layer = model.get_submodule(name)
    weight = cast(Tensor, layer.weight)
    merged = (weight.float() + (update.T if isinstance(layer, Conv1D) else update)).to(dtype)
    if not torch.isfinite(merged).all():
        raise NonFiniteError(f"The merged weight of {name} is not finite in {dtype}. Choose bfloat16 or float32.")
    layer.weight = nn.Parameter(merged.contiguous(), requires_grad=False)
    if layer is cast(Any, model).get_output_embeddings():
        model.config.tie_word_embeddings = False


@torch.no_grad()
def _place_head(model: PreTrainedModel, artifact: Artifact) -> None:
    """Write the adapter's head and its labels into the model."""
    manifest = artifact.manifest
    if not manifest.head:
        return
    model.load_state_dict({name: torch.from_numpy(array) for name, array in artifact.head().items()}, strict=False)
    config: Any = model.config
    if manifest.labels:
        config.id2label = dict(enumerate(manifest.labels))
        config.label2id = {label: i for i, label in enumerate(manifest.labels)}
    config.problem_type = "single_label_classification" if manifest.labels else "regression"
    _check_place(model)


def _check_place(model: PreTrainedModel) -> None:
    """Refuse a parameter that transformers would leave out when it loads the model: a decoder's head has no bias."""
    with torch.device("meta"):
        stock = cast(Any, type(model))(model.config).state_dict()
    for name in model.state_dict().keys() - stock.keys():
        raise ExportError(
            f"transformers' {type(model).__name__} has no parameter {name}, so a merged model would answer otherwise. "
            "Export it as lora, and see docs/handover.md for its head."
        )
