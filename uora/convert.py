"""Exact conversion of every method to plain LoRA, for stock PEFT and every LoRA server: no SVD, no approximation.
Free of torch.

| method | lora_A | lora_B | rank |
|---|---|---|---|
| uora, vera | diag(d) A | diag(b) B | r |
| lora, olora | as stored | as stored | r, 2r |
| osora | diag(s) V and diag(s - s0) V | diag(o - 1) U and U | 2r |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from uora.artifact import Artifact
from uora.folders import new_folder
from uora.frames import FrameKey, Side, check_fingerprint, fingerprint, frame
from uora.layout import VERA_INIT, ModuleShape, pair_rank
from uora.reinit import blend
from uora.spec import FrameInit, LoraSpec, OloraSpec, OsoraSpec, UoraSpec, VeraSpec

Float32 = NDArray[np.float32]


class BaseWeights(Protocol):
    """What an osora adapter stands on (``uora.svd.BaseWeights``, which needs torch)."""

    def fingerprint(self, names: Iterable[str], r: int) -> dict[str, list[float]]:
        """Probes of the singular vectors of these layers."""

    def pair(self, name: str, o: Float32, s: Float32) -> tuple[Float32, Float32]:
        """A layer's update as LoRA has it: a ``(2r, in)``, b ``(out, 2r)``."""


@dataclass(frozen=True)
class Pair:
    """A module's update as LoRA has it, ``dW = scale b a``: a ``(rank, in)``, b ``(out, rank)``."""

    module: ModuleShape
    a: Float32
    b: Float32


@dataclass(frozen=True)
class Scale:
    """LoRA's rank and ``lora_alpha``; the pair is multiplied by ``alpha / rank``."""

    rank: int
    alpha: float


def scale(artifact: Artifact) -> Scale:
    """Rank and scale of the equal LoRA."""
    match artifact.manifest.adapter:
        case LoraSpec() | OloraSpec() as spec:
            rank = pair_rank(spec)
            return Scale(rank, spec.lora_alpha * rank / spec.r)
        case OsoraSpec(r=r):
            return Scale(2 * r, 2 * r)
        case UoraSpec(r=r) | VeraSpec(r=r):
            return Scale(r, r)


def pairs(artifact: Artifact, *, base: BaseWeights | None = None, cache_dir: Path | None = None) -> Iterator[Pair]:
    """Each module's pair.

    Args:
        artifact: a verified adapter.
        base: the base model's weights; needed for osora alone, whose vectors stand on their singular vectors.
        cache_dir: disk cache of frames.

    Raises:
        FingerprintError: the frames or singular vectors built here are not those the adapter was trained on.
    """
    match artifact.manifest.adapter:
        case LoraSpec() | OloraSpec():
            for module, own in artifact.parts():
                yield Pair(module, own["lora_a"], own["lora_b"])
        case OsoraSpec() as spec:
            yield from _singular_pairs(artifact, spec, base)
        case UoraSpec(init=init) as spec:
            yield from _frame_pairs(artifact, spec.frame_seed, init, cache_dir)
        case VeraSpec() as spec:
            yield from _frame_pairs(artifact, spec.frame_seed, VERA_INIT, cache_dir)


def _frame_pairs(artifact: Artifact, seed: int, init: FrameInit, cache_dir: Path | None) -> Iterator[Pair]:
    check_fingerprint(artifact.manifest.fingerprint, fingerprint(artifact.manifest.frame_keys(), cache_dir))
    r = artifact.manifest.adapter.r
    weights = artifact.weights()
    built = cache(partial(frame, cache_dir=cache_dir))  # layers of one size share theirs

    def blended(side: Side, features: int, index: int) -> Float32:
        start, target = (FrameKey(seed, side, generation, r, features, init) for generation in (0, 1))
        if weights is None:
            return built(start)
        return blend(built(start), built(target), weights[index])

    for index, (module, own) in enumerate(artifact.parts()):
        a = blended("A", module.in_features, index)
        b_rows = blended("B", module.out_features, index)
        yield Pair(module, own["d"][:, None] * a, own["b"][:, None] * b_rows.T)


def _singular_pairs(artifact: Artifact, spec: OsoraSpec, base: BaseWeights | None) -> Iterator[Pair]:
    if base is None:
        raise ValueError("an osora adapter is converted with its base model's weights; give base")
    names = [module.name for module in artifact.manifest.modules]
    check_fingerprint(artifact.manifest.fingerprint, base.fingerprint(names, spec.r))
    for module, own in artifact.parts():
        a, b = base.pair(module.name, own["o"], own["s"])
        yield Pair(module, a, b)


def lora_tensors(
    artifact: Artifact, *, base: BaseWeights | None = None, cache_dir: Path | None = None
) -> dict[str, Float32]:
    """Weights of the equal LoRA, float32, named as PEFT names them in a checkpoint; arguments and errors of `pairs`."""
    tensors: dict[str, Float32] = {}
    for pair in pairs(artifact, base=base, cache_dir=cache_dir):
        prefix = f"base_model.model.{pair.module.name}"
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(pair.a)
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(pair.b)
    return tensors | {f"base_model.model.{name}": tensor for name, tensor in artifact.head().items()}


def lora_config(artifact: Artifact) -> dict[str, object]:
    """``adapter_config.json`` of the equal LoRA."""
    size = scale(artifact)
    heads = sorted({name.rpartition(".")[0] for name in artifact.manifest.head})
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": artifact.manifest.base_model,
        "r": size.rank,
        "lora_alpha": size.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [module.name for module in artifact.manifest.modules],
        "modules_to_save": heads or None,
    }


def write_lora(
    artifact: Artifact, directory: Path, *, base: BaseWeights | None = None, cache_dir: Path | None = None
) -> None:
    """Write the equal LoRA as a PEFT directory, new or empty; arguments and errors of `pairs`.

    Raises:
        ExportError: something is in the directory already.
    """
    with new_folder(directory) as scratch:
        for name, content in lora_files(artifact, base=base, cache_dir=cache_dir).items():
            (scratch / name).write_bytes(content)


def lora_files(
    artifact: Artifact, *, base: BaseWeights | None = None, cache_dir: Path | None = None
) -> dict[str, bytes]:
    """The files of a PEFT directory by their names; arguments and errors of `pairs`."""
    tensors = lora_tensors(artifact, base=base, cache_dir=cache_dir)
    return {
        "adapter_config.json": (json.dumps(lora_config(artifact), indent=2) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def lora_bytes(shapes: Sequence[tuple[int, int]], r: int, bytes_per_number: int = 4) -> int:
    """Size of a LoRA's weights over layers of ``(in, out)``: what an adapter is compared with."""
    return sum(r * (size_in + size_out) for size_in, size_out in shapes) * bytes_per_number
