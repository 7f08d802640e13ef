"""Exact conversion to plain LoRA, for stock PEFT and every LoRA server (no SVD, no torch).

``diag(b) B diag(d) A`` is a product of rank r already: ``lora_A = diag(d) A``, ``lora_B = diag(b) B``, ``alpha = r``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from uora.artifact import Artifact
from uora.frames import FrameKey, Side, check_fingerprint, fingerprint, frame

Float32 = NDArray[np.float32]


def blended_frame(artifact: Artifact, side: Side, features: int, cache_dir: Path | None = None) -> Float32:
    """The adapter's frame after its hits, ``w F0 + (1 - w) F1``, rows ``(r, features)``."""
    spec = artifact.manifest.adapter
    start, target = (
        frame(FrameKey(spec.frame_seed, side, generation, spec.r, features), cache_dir) for generation in (0, 1)
    )
    weight = artifact.weight()[:, None]
    return weight * start + (1 - weight) * target


def lora_tensors(artifact: Artifact, cache_dir: Path | None = None) -> dict[str, Float32]:
    """Weights of the equal LoRA, float32, named as PEFT names them in a checkpoint.

    Raises:
        FingerprintError: the frames built here are not those the adapter was trained on.
    """
    check_fingerprint(artifact.manifest.fingerprint, fingerprint(artifact.manifest.frame_keys(), cache_dir))
    tensors: dict[str, Float32] = {}
    for module, d, b in artifact.vectors():
        a = blended_frame(artifact, "A", module.in_features, cache_dir)
        b_rows = blended_frame(artifact, "B", module.out_features, cache_dir)
        prefix = f"base_model.model.{module.name}"
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(d[:, None] * a)
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[:, None] * b_rows.T)
    return tensors


def lora_config(artifact: Artifact) -> dict[str, object]:
    """``adapter_config.json`` of the equal LoRA."""
    r = artifact.manifest.adapter.r
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": artifact.manifest.base_model,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [module.name for module in artifact.manifest.modules],
    }


def write_lora(artifact: Artifact, directory: Path, cache_dir: Path | None = None) -> None:
    """Write the equal LoRA as a PEFT directory (``adapter_config.json``, ``adapter_model.safetensors``)."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(artifact, cache_dir), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(lora_config(artifact), indent=2) + "\n")


def lora_bytes(shapes: list[tuple[int, int]], r: int, bytes_per_number: int = 4) -> int:
    """Size of a LoRA's weights over layers of ``(in, out)``: what an adapter is compared with."""
    return sum(r * (size_in + size_out) for size_in, size_out in shapes) * bytes_per_number
