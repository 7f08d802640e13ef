"""The training forward of a low-rank update: ``y = W0 x + (A x) C`` with ``C = (diag(b) B diag(d))^T``.

Written so that nothing of the size of the activations is made or kept beyond the base layer's own output: the vectors
scale the frame B, which is small, instead of the activations; the product is added to the base layer's output in place;
only ``A x`` (r numbers a token) is kept for the backward pass, whose one product ``(A x)^T g`` gives the gradients of
all vectors. ``A x`` is computed once for the layers that are given the same x (query, key and value; gate and up).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F


class Pair(NamedTuple):
    """A low-rank update ``(A x) C`` in the dtype of the activations."""

    a: Tensor  # (r, in)
    c: Tensor  # (r, out)


def scaled_rows(rows: Tensor, d: Tensor, b: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``diag(d) rows diag(b)``, computed in float32 and rounded once; differentiable in d and b.

    Args:
        rows: frame B as rows, float32 ``(r, out)``.
        d: ``(r,)``.
        b: ``(out,)``.
        dtype: of the result, ``(r, out)``.
    """
    return cast(Tensor, _ScaledRows.apply(rows, d, b, dtype))


class _ScaledRows(Function):
    """Keeps the vectors and the frame for the backward pass, and no product of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows, d, b)
        return (d[:, None] * rows).mul_(b).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        rows, d, b = ctx.saved_tensors
        both = gradient * rows  # (r, out), float32
        return None, both @ b, d @ both, None


class SharedProducts:
    """``A x`` of the latest x, for the layers that are given the same x one after the other."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._when: tuple[int, bool, int] | None = None
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        """``A x``.

        Args:
            x: activations, ``(..., in)``.
            a: ``(r, in)``, never written to.

        Returns:
            ``(..., r)``.
        """
        when = x._version, torch.is_grad_enabled(), _pass()
        if self._x is None or self._x() is not x or self._when != when:
            self._x, self._when, self._products = weakref.ref(x), when, {}
        if id(a) not in self._products:
            self._products[id(a)] = a, F.linear(x, a)  # with a itself, so that its id stays its own
        return self._products[id(a)][1]

    def clear(self) -> None:
        """Forget, at the end of a forward: a later one of the same x has a graph of its own."""
        self._x, self._products = None, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedProducts:
        """A copy starts empty."""
        return SharedProducts()


def _pass() -> int:
    """Number of the backward pass that this runs in, where activations are computed again; -1 outside of one.

    What is computed again must not use what was kept from the first time: torch counts both.
    """
    return torch._C._current_graph_task_id()


@dataclass(frozen=True)
class Segment:
    """Tokens ``start:stop`` of a packed sequence, which belong to one adapter."""

    start: int
    stop: int


def add_pairs(base: Tensor, z: Tensor, cs: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """Add ``z C`` to the base layer's output, in place; each segment of the tokens has its own C.

    Args:
        base: ``(tokens, out)``, which nobody else needs.
        z: ``A x``, ``(tokens, r)``.
        cs: a ``(r, out)`` for each segment.
        segments: the whole of the tokens, in order.

    Returns:
        ``base``, as a part of the graph.
    """
    return cast(Tensor, _AddPairs.apply(base, z, tuple(segments), *cs))


class _AddPairs(Function):
    """Keeps z and the Cs. One function for all segments: autograd would copy the whole for each write to a part."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, z: Tensor, segments: tuple[Segment, ...], *cs: Tensor) -> Tensor:
        ctx.save_for_backward(z, *cs)
        ctx.segments = segments
        for segment, c in zip(segments, cs, strict=True):
            base[segment.start : segment.stop].addmm_(z[segment.start : segment.stop], c)
        ctx.mark_dirty(base)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, *cs = ctx.saved_tensors
        of_z = torch.empty_like(z) if ctx.needs_input_grad[1] else None
        of_cs = []
        for segment, c in zip(ctx.segments, cs, strict=True):
            own = gradient[segment.start : segment.stop]
            if of_z is not None:
                torch.mm(own, c.T, out=of_z[segment.start : segment.stop])
            of_cs.append(z[segment.start : segment.stop].T @ own)
        return gradient, of_z, None, *of_cs


def add_mixed(
    base: Tensor, z: Tensor, rows: Tensor, d: Tensor, b: Tensor, owners: Tensor, share: Tensor | None = None
) -> Tensor:
    """Add ``b * (B (d * z))`` to the base layer's output, in place, every token with its own adapter's d and b.

    Its cost does not grow with the number of adapters, as that of `add_pairs` does. With ``share`` w, every token has
    its own adapter's frames too, as in `uora.delta.mixed_delta`: ``z = w z0 + (1 - w) z1``, and likewise B.

    Args:
        base: ``(tokens, out)``, which nobody else needs.
        z: ``A x``, ``(tokens, r)``; with a share z0 and z1 side by side, ``(tokens, 2 r)``.
        rows: frame B as rows, common to all, ``(r, out)``; with a share B0 above B1, ``(2 r, out)``.
        d: ``(adapters, r)``, float32.
        b: ``(adapters, out)``, float32.
        owners: number of each token's adapter, ``(tokens,)``.
        share: w, ``(adapters, r)``; None where it is 1.

    Returns:
        ``base``, as a part of the graph.
    """
    return cast(Tensor, _AddMixed.apply(base, z, rows, d, b, owners, share))


class _AddMixed(Function):
    """Keeps z, of the size of r; what is of the size of the output is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, z: Tensor, rows: Tensor, d: Tensor, b: Tensor, owners: Tensor, share: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(z, rows, d, b, owners, share)
        w = None if share is None else _of_tokens(share, owners, like=z)
        scaled = _fold(z, w) * _of_tokens(d, owners, like=z)
        base.addcmul_(_unfold(scaled, w) @ rows, _of_tokens(b, owners, like=z))
        ctx.mark_dirty(base)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, rows, d, b, owners, share = ctx.saved_tensors
        w = None if share is None else _of_tokens(share, owners, like=z)
        own_d, folded = _of_tokens(d, owners, like=z), _fold(z, w)
        of_scaled = _fold((gradient * _of_tokens(b, owners, like=z)) @ rows.T, w)
        of_b = _sums((_unfold(folded * own_d, w) @ rows).mul_(gradient), owners, like=b)
        of_d = _sums(of_scaled * folded, owners, like=d)
        return gradient, _unfold(of_scaled * own_d, w), None, of_d, of_b, None, None


def _of_tokens(vectors: Tensor, owners: Tensor, *, like: Tensor) -> Tensor:
    """Each token's own row of ``vectors``, in the dtype of ``like``."""
    return vectors.to(like.dtype).index_select(0, owners)


def _fold(both: Tensor, w: Tensor | None) -> Tensor:
    """``w`` of the first half of the columns and ``1 - w`` of the second; all of the whole for None."""
    if w is None:
        return both
    start, target = both.chunk(2, dim=-1)
    return torch.lerp(target, start, w)


def _unfold(values: Tensor, w: Tensor | None) -> Tensor:
    """The transpose of `_fold`."""
    if w is None:
        return values
    of_start = values * w
    return torch.cat([of_start, values - of_start], dim=-1)


def _sums(values: Tensor, owners: Tensor, *, like: Tensor) -> Tensor:
    """Sums over each adapter's tokens, in float32. A product with zeros and ones would spread one's NaN to all."""
    return torch.zeros_like(like).index_add_(0, owners, values.to(like.dtype))
