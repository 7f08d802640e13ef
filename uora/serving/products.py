"""Products with fixed weights, laid out once for the device that computes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from uora.delta import Family, both_frames, frame_tensor
from uora.frames import Side

Product = Callable[[Tensor], Tensor]

#: Products of frames kept by one process, over all families, sizes, devices and dtypes.
_MAX_FRAMES = 512


def product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """``x W^T + bias`` for a frozen ``weight (out, in)``.

    torch brings weights on a CPU into oneDNN's layout anew in every product in bfloat16, which for a step over 32 rows
    takes a quarter of the time, and multiplies with MKL in float32. Here it is oneDNN for both, and the layout is made
    once. So what a row gets is the same to the bit in a batch of any size, which MKL's products are not.
    """
    weight = weight.detach()
    if not _onednn_multiplies(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _onednn_multiplies(weight: Tensor) -> bool:
    """Its bfloat16 needs AVX-512 or AVX-NE-CONVERT on x86; without, laying out a weight raises."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def down_product(family: Family, features: int, *, both: bool, like: Tensor) -> Product:
    """``A x`` for ``x (..., features)``: ``(..., r)``, or with both frames ``(..., 2 r)``, start before target."""
    return _down_product(family, features, both, like.device, like.dtype)


def up_product(family: Family, outs: tuple[int, ...], *, both: bool, like: Tensor) -> Product:
    """``B u`` of modules with ``outs`` outputs side by side, ``(..., sum(outs))``.

    Of ``u (..., modules * r)``, or with both frames ``(..., modules * 2 r)``: each module has its own u and B.
    """
    return _up_product(family, outs, both, like.device, like.dtype)


@lru_cache(_MAX_FRAMES)
def _down_product(family: Family, features: int, both: bool, device: torch.device, dtype: torch.dtype) -> Product:
    return product(_frame(family, "A", features, both, torch.empty(0, device=device, dtype=dtype)))


@lru_cache(_MAX_FRAMES)
def _up_product(family: Family, outs: tuple[int, ...], both: bool, device: torch.device, dtype: torch.dtype) -> Product:
    like = torch.empty(0, device=device, dtype=dtype)
    frames = [_frame(family, "B", out, both, like).T for out in outs]
    return product(torch.block_diag(*frames))  # type: ignore[no-untyped-call]


def _frame(family: Family, side: Side, features: int, both: bool, like: Tensor) -> Tensor:
    if both:
        return both_frames(family, side, features, like=like)
    return frame_tensor(family, side, 0, features, like=like)
