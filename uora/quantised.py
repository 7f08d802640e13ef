"""What a quantised base model needs besides PEFT's quantisation hooks. Leaves other models as they are."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_weight_layout(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit weights lie in memory as they were quantised.

    On a CPU with AVX512-BF16 the first inference would reorder them, and round their scales to bfloat16, for a faster
    product. From then on they dequantise to other numbers, so that a merge would destroy them, training through them
    fails, and layers whose outputs are not a multiple of 32 cannot be run at all (found with bitsandbytes 0.50.2).
    Weights that were reordered before are put back; the rounding of their scales stays.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # bitsandbytes puts the weight back before it is saved
