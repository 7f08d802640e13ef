"""The one forward of UORA, for training and for serving (arXiv 2505.20154)::

    h = W0 x + bias + b * (B (d * (A x)))          dW = diag(b) B diag(d) A

A, B are frames (``uora.frames``), shared by every adapter; d and b are an adapter's own.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uora.frames import FrameKey, Side, frame
from uora.spec import FrameInit

#: Frames kept as tensors by one process, over all devices and dtypes.
_MAX_TENSORS = 512
_tensors: OrderedDict[tuple[tuple[FrameKey, ...], torch.device, torch.dtype], Tensor] = OrderedDict()


class Family(NamedTuple):
    """Adapters whose frames are the same: their rows can share one product."""

    seed: int
    r: int
    cache_dir: Path | None = None
    init: FrameInit = "orthogonal"

    def key(self, side: Side, generation: int, features: int) -> FrameKey:
        """Name of this family's frame for a layer side of ``features``."""
        return FrameKey(self.seed, side, generation, self.r, features, self.init)


def frame_tensor(family: Family, side: Side, generation: int, features: int, *, like: Tensor) -> Tensor:
    """A frame as a constant ``(r, features)`` tensor in the device and dtype of ``like``.

    float32 is the truth; another dtype is a copy for compute. Side B is stored as rows too: the layer's B is its
    transpose, of shape ``(out, r)``.
    """
    return _tensor((family.key(side, generation, features),), family.cache_dir, like)


def both_frames(family: Family, side: Side, features: int, *, like: Tensor) -> Tensor:
    """The start frame above the target frame, ``(2 r, features)``, else as `frame_tensor`."""
    return _tensor((family.key(side, 0, features), family.key(side, 1, features)), family.cache_dir, like)


def _tensor(keys: tuple[FrameKey, ...], cache_dir: Path | None, like: Tensor) -> Tensor:
    slot = (keys, like.device, like.dtype)
    tensor = _tensors.get(slot)
    if tensor is None:
        with torch.inference_mode(False):  # an inference tensor could not be used in training later
            # frame() hands out read-only arrays and torch has no read-only tensors: concatenating makes a copy.
            rows = np.concatenate([frame(key, cache_dir) for key in keys])
            tensor = torch.from_numpy(rows).to(like.device, like.dtype)
        _tensors[slot] = tensor
        if len(_tensors) > _MAX_TENSORS:
            _tensors.popitem(last=False)
    else:
        _tensors.move_to_end(slot)
    return tensor


def delta(x: Tensor, a: Tensor, b_rows: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Update of one linear layer by one adapter, ``b * (B (d * (A x)))``.

    Args:
        x: activations, ``(..., in)``.
        a: frame A, ``(r, in)``.
        b_rows: frame B as rows, ``(r, out)``.
        d: rank scale, ``(r,)``.
        b: output scale, ``(out,)``.

    Returns:
        ``(..., out)`` in the dtype of ``x``; the vectors are cast to it, the frames must have it.
    """
    scaled = F.linear(x, a) * d.to(x.dtype)  # (..., r)
    return F.linear(scaled, b_rows.T) * b.to(x.dtype)


def mixed_delta(x: Tensor, family: Family, *, d: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """Update of one linear layer for a batch whose rows belong to different adapters of one family.

    With each row's share w (``uora.reinit.weights``), ``A_row = w A0 + (1 - w) A1`` and likewise B, so::

        y = B0^T (w * u) + B1^T ((1 - w) * u),   u = d * (w * A0 x + (1 - w) * A1 x)

    Args:
        x: activations, ``(rows, ..., in)``.
        family: the adapters' common frames.
        d: rank scales, ``(rows, r)``.
        b: output scales, ``(rows, out)``.
        weight: w, ``(rows, r)``; None when no row's adapter has hits, which halves the work.

    Returns:
        ``(rows, ..., out)`` in the dtype of ``x``.
    """
    d, b = _rows(d, x), _rows(b, x)
    features_in, features_out = x.shape[-1], b.shape[-1]
    a0 = frame_tensor(family, "A", 0, features_in, like=x)
    b0 = frame_tensor(family, "B", 0, features_out, like=x)
    if weight is None:
        return F.linear(F.linear(x, a0) * d, b0.T) * b
    w = _rows(weight, x)
    a1 = frame_tensor(family, "A", 1, features_in, like=x)
    b1 = frame_tensor(family, "B", 1, features_out, like=x)
    u = (w * F.linear(x, a0) + (1 - w) * F.linear(x, a1)) * d
    return (F.linear(w * u, b0.T) + F.linear((1 - w) * u, b1.T)) * b


def _rows(vectors: Tensor, x: Tensor) -> Tensor:
    """``(rows, k)`` vectors, shaped to multiply ``(rows, ..., k)`` activations of the dtype of ``x``."""
    middle = (1,) * (x.dim() - 2)
    return vectors.to(x.dtype).view(vectors.shape[0], *middle, vectors.shape[-1])
