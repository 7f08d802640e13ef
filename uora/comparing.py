"""Whether a model computes the same in two ways: tokens to try it on, and how far two results are apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

#: `relative_difference` by which a model's logits may differ with another kernel of attention. Random tiny models of
#: 16 types with our kernels: at most 7e-7 in float32 and 0.006 in bfloat16; but stock kernels differ by 0.08 in a
#: trained bfloat16 model (SmolLM2), whose activations have outliers. What is computed wrongly differs by 0.4 to 1:
#: missing biases of distance or masks, another row's tokens, wrong positions.
KERNEL_TOLERANCES: defaultdict[torch.dtype, float] = defaultdict(lambda: 0.25, {torch.float32: 0.01})


def tokens_to_try(vocabulary: int, count: int) -> list[int]:
    """Token ids from all over the vocabulary, since special tokens make bfloat16 models lose their precision."""
    return [(37 * i * i + 11 * i + 5) * max(vocabulary // 97, 1) % vocabulary for i in range(count)]


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Size of the difference of logits ``(tokens, vocabulary)`` relative to how much the expected ones vary."""
    one, other = torch.cat([*found]).float(), torch.cat([*expected]).float()
    return float((one - other).norm() / (other - other.mean(dim=-1, keepdim=True)).norm())
