"""Reinitialisation guided by the magnitude of d, in closed form (arXiv 2505.20154; reference code of its author).

After each optimizer step every ``|d_l[i]| < tau`` counts; each ``count_k``-th count of a layer is a hit on index i::

    A[i, :] <- alpha A[i, :] + (1 - alpha) A1[i, :]        B[:, i] <- alpha B[:, i] + (1 - alpha) B1[:, i]

The target frames A1, B1 are fixed, so after n[i] hits ``A[i] = w[i] A0[i] + (1 - w[i]) A1[i]`` with
``w[i] = alpha ** n[i]``: the hit counts are the whole state, and the frames are never written to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReinitRule:
    """When an index is hit and what a hit leaves.

    Attributes:
        alpha: share of the old row that a hit leaves, 0..1.
        tau: ``|d[i]| < tau`` counts.
        count_k: every ``count_k``-th count is a hit.
    """

    alpha: float
    tau: float
    count_k: int


def count_hits(rule: ReinitRule, magnitudes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the rule, without side effects.

    Args:
        rule: the rule.
        magnitudes: ``|d|`` of all adapted layers, ``(layers, r)``.
        counts: how often each was below tau so far, integer, ``(layers, r)``.

    Returns:
        The new counts, ``(layers, r)``, and the new hits per index, ``(r,)``: layers add up, since they share
        the pair of frames.
    """
    below = magnitudes < rule.tau
    counts = counts + below
    hits = below & (counts % rule.count_k == 0)
    return counts, hits.sum(dim=0)


def weights(alpha: float, hits: Tensor) -> Tensor:
    """Share ``w = alpha ** n`` that the start frames still have, float32, of the shape of ``hits``."""
    return (alpha ** hits.double()).float()


def blend(start: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Rows ``w[i] start[i] + (1 - w[i]) target[i]`` of a frame ``(r, n)`` after its hits, ``weight`` ``(r,)``."""
    share = weight.to(start.dtype).unsqueeze(-1)
    return share * start + (1 - share) * target
