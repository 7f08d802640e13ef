"""How much memory is free, and what ranks it allows."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from uora import layout
from uora.errors import RankError
from uora.layout import ModuleShape, pair_rank
from uora.spec import AdapterSpec, LoraSpec, OloraSpec, OsoraSpec


def available_bytes(device: torch.device) -> int:
    """Bytes that can be taken on ``device`` without pushing anything out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_memory(spec: AdapterSpec, modules: Sequence[ModuleShape], *, device: torch.device) -> None:
    """Refuse a rank whose matrices this machine cannot hold.

    Raises:
        RankError: it needs more than is free.
    """
    needed, free = _bytes_needed(spec, modules), available_bytes(device)
    if needed > free:
        raise RankError(
            f"Rank {spec.r} of the method {spec.method} over {len(modules)} modules needs {needed / 2**30:.1f} GiB, "
            f"found {free / 2**30:.1f} GiB free. Take a rank of {max(1, int(spec.r * free / needed))} at most, or "
            "fewer targets."
        )


def _bytes_needed(spec: AdapterSpec, modules: Sequence[ModuleShape]) -> int:
    """Bytes of the matrices that grow with the rank, float32; an adapter's own with gradient and Adam's two moments."""
    if isinstance(spec, LoraSpec | OloraSpec):
        return 4 * 4 * pair_rank(spec) * sum(m.in_features + m.out_features for m in modules)
    if isinstance(spec, OsoraSpec):
        return 4 * spec.r * sum(m.in_features + m.out_features for m in modules)
    keys = layout.frame_keys(spec, modules)
    # While one is built, its normals and factors are there in float64.
    return sum(4 * key.r * key.n for key in keys) + max(3 * 8 * key.r * key.n for key in keys)
