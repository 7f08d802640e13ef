"""Reinitialisation guided by the magnitude of d, in closed form (arXiv 2505.20154; reference code of its author).

After each optimizer step every ``|d_l[i]| < tau`` counts; each ``count_k``-th count of a layer is a hit on index i::

    A[i, :] <- alpha A[i, :] + (1 - alpha) A1[i, :]        B[:, i] <- alpha B[:, i] + (1 - alpha) B1[:, i]

The target frames A1, B1 are fixed, so after some hits ``A[i] = w[i] A0[i] + (1 - w[i]) A1[i]``, where ``w[i]`` is the
product of their alphas, ``alpha ** n[i]`` if it is constant: the numbers of hits are the whole state, and the frames
are never written to.

A hit of one layer changes the frames of all (scope "shared", the reference) or of that layer (scope "layer"). Free of
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from uora.spec import UoraSpec

if TYPE_CHECKING:
    from torch import Tensor

Float32 = NDArray[np.float32]
Integers = NDArray[np.integer]
Matrix = TypeVar("Matrix", Float32, "Tensor")

#: Dynamic alpha of the reference code: what each count takes off, and where it ends.
_ALPHA_STEP = 0.05
_ALPHA_FLOOR = 0.5
#: Hits after which a dynamic alpha is at its floor, whatever it started from: (1 - floor) / step.
_HITS_TO_FLOOR = 10


@dataclass(frozen=True)
class ReinitRule:
    """When an index is hit and what a hit leaves.

    Attributes:
        alpha: share of the old row that a hit leaves, 0..1.
        tau: ``|d[i]| < tau`` counts.
        count_k: every ``count_k``-th count is a hit.
        dynamic_alpha: a hit at a layer's c-th count leaves ``max(0.5, alpha - 0.05 c)`` instead.
        scope: whether a hit changes an index for all layers or for its own.
        tau_quantile: share of all d that counts, those of the smallest magnitude; None where tau decides.
        reinit_interval: optimizer steps from one such choice to the next.
    """

    alpha: float
    tau: float
    count_k: int
    dynamic_alpha: bool = False
    scope: Literal["shared", "layer"] = "shared"
    tau_quantile: float | None = None
    reinit_interval: int | None = None

    @classmethod
    def of(cls, spec: UoraSpec) -> Self:
        """The rule of an adapter's settings."""
        return cls(
            alpha=spec.alpha,
            tau=spec.tau,
            count_k=spec.count_k,
            dynamic_alpha=spec.dynamic_alpha,
            scope=spec.reinit_scope,
            tau_quantile=spec.tau_quantile,
            reinit_interval=spec.reinit_interval,
        )


def hits_shape(spec: UoraSpec, layers: int) -> tuple[int, ...]:
    """Shape of an adapter's numbers of hits: ``(r,)`` where layers only add up, else ``(layers, r)``."""
    own = spec.reinit_scope == "layer" or spec.dynamic_alpha
    return (layers, spec.r) if own else (spec.r,)


def count_hits(rule: ReinitRule, magnitudes: Float32, counts: Integers, step: int) -> tuple[Integers, Integers]:
    """Apply the rule once, without side effects.

    Args:
        rule: the rule.
        magnitudes: ``|d|`` of all adapted layers, ``(layers, r)``.
        counts: how often each has counted so far, ``(layers, r)``.
        step: optimizer steps made, from 1.

    Returns:
        The new counts and the new hits, 0 or 1, both ``(layers, r)``.
    """
    small = _small(rule, magnitudes, step)
    counts = counts + small
    hits = small & (counts % rule.count_k == 0)
    return counts, hits.astype(counts.dtype)


def _small(rule: ReinitRule, magnitudes: Float32, step: int) -> NDArray[np.bool_]:
    """Which magnitudes count in this step."""
    if rule.tau_quantile is None:
        return magnitudes < rule.tau
    small = np.zeros(magnitudes.shape, dtype=np.bool_)
    if step % (rule.reinit_interval or 1) == 0:
        number = max(1, int(rule.tau_quantile * magnitudes.size))
        smallest = np.argsort(magnitudes, axis=None, kind="stable")[:number]  # equal ones by their position
        small.flat[smallest] = True
    return small


def weights(rule: ReinitRule, hits: Integers) -> Float32:
    """Share w that the start frames still have.

    Args:
        rule: the rule.
        hits: numbers of hits, ``(r,)`` or ``(layers, r)`` (see `hits_shape`).

    Returns:
        ``(r,)`` for scope "shared", where the layers' shares multiply; ``(layers, r)`` for scope "layer".
    """
    share = _share(rule, hits.astype(np.float64))
    if rule.scope == "shared" and share.ndim == 2:
        share = share.prod(axis=0)
    return share.astype(np.float32)


def _share(rule: ReinitRule, hits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Product of the alphas of each number of hits, in float64."""
    if not rule.dynamic_alpha:
        return np.asarray(rule.alpha**hits)
    counts = rule.count_k * np.arange(1, _HITS_TO_FLOOR + 1)  # a layer's count at its j-th hit is j * count_k
    alphas = np.maximum(_ALPHA_FLOOR, rule.alpha - _ALPHA_STEP * counts)
    products = np.concatenate([[1.0], np.cumprod(alphas)])
    early = np.minimum(hits, _HITS_TO_FLOOR)
    return np.asarray(products[early.astype(np.intp)] * _ALPHA_FLOOR ** (hits - early))


def blend(start: Matrix, target: Matrix, weight: Matrix) -> Matrix:
    """Rows ``w[i] start[i] + (1 - w[i]) target[i]`` of a frame ``(r, n)`` after its hits, ``weight`` ``(r,)``."""
    share = weight[:, None]
    return share * start + (1 - share) * target
