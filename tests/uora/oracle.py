"""The methods and UORA's reinitialisation in NumPy, written from the papers' formulas. No code is shared with the torch
implementation but the frames, which have tests of their own; they are mutated step by step as the reference algorithm
does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uora.frames import FrameKey, frame
from uora.spec import AdapterSpec, LoraSpec, OloraSpec, OsoraSpec, UoraSpec, VeraSpec

Array = NDArray[np.float64]


def forward(x: Array, w0: Array, a: Array, b_matrix: Array, d: Array, b: Array) -> Array:
    """h = W0 x + b * (B (d * (A x))): x ``(batch, in)``, w0 ``(out, in)``, a ``(r, in)``, b_matrix ``(out, r)``."""
    h = np.empty((x.shape[0], w0.shape[0]))
    for row in range(x.shape[0]):
        z = a @ x[row]
        u = d * z
        y = b_matrix @ u
        h[row] = w0 @ x[row] + b * y
    return h


def merged(w0: Array, a: Array, b_matrix: Array, d: Array, b: Array) -> Array:
    """W0 + diag(b) B diag(d) A."""
    return w0 + np.diag(b) @ b_matrix @ np.diag(d) @ a


@dataclass
class Mutating:
    """The reference algorithm: A and B are overwritten at every hit, and each layer counts for itself.

    Each layer has its pair; where a hit changes all layers, every layer has the one and the same.
    """

    a: list[Array]
    b_matrix: list[Array]
    a_target: Array
    b_target: Array
    alpha: float
    count_k: int
    tau: float = 0.0
    dynamic_alpha: bool = False
    tau_quantile: float | None = None
    reinit_interval: int = 1

    def __post_init__(self) -> None:
        self.counts = np.zeros((len(self.a), self.a[0].shape[0]), dtype=int)
        self.steps = 0

    def step(self, d: Array) -> int:
        """One optimizer step's d of all layers, ``(layers, r)``; returns the hits."""
        self.steps += 1
        hits = 0
        for layer, i in self._small(d):
            self.counts[layer, i] += 1
            if self.counts[layer, i] % self.count_k == 0:
                self._hit(layer, i)
                hits += 1
        return hits

    def _small(self, d: Array) -> list[tuple[int, int]]:
        every = [(layer, i) for layer in range(d.shape[0]) for i in range(d.shape[1])]
        if self.tau_quantile is None:
            return [at for at in every if abs(d[at]) < self.tau]
        if self.steps % self.reinit_interval != 0:
            return []
        number = max(1, math.floor(self.tau_quantile * len(every)))
        return sorted(every, key=lambda at: abs(d[at]))[:number]

    def _hit(self, layer: int, i: int) -> None:
        alpha = max(0.5, self.alpha - 0.05 * self.counts[layer, i]) if self.dynamic_alpha else self.alpha
        a, b_matrix = self.a[layer], self.b_matrix[layer]
        a[i, :] = alpha * a[i, :] + (1 - alpha) * self.a_target[i, :]
        b_matrix[:, i] = alpha * b_matrix[:, i] + (1 - alpha) * self.b_target[:, i]


def update(spec: AdapterSpec, own: Mapping[str, Array], w0: Array, weight: Array | None) -> Array:
    """dW ``(out, in)`` of one layer by any method, from a stored adapter's numbers in float64.

    Args:
        spec: the method's settings.
        own: the layer's numbers.
        w0: the base weight, ``(out, in)``.
        weight: share of the start frames, ``(r,)``; None for all.
    """
    n = {name: np.asarray(values, dtype=np.float64) for name, values in own.items()}
    match spec:
        case LoraSpec() | OloraSpec():
            return spec.lora_alpha / spec.r * n["lora_b"] @ n["lora_a"]
        case OsoraSpec(r=r):
            u, s, v = np.linalg.svd(w0, full_matrices=False)
            k = min(r, len(s))
            scaled = np.diag(n["o"]) @ u[:, :k] @ np.diag(n["s"][:k])
            return (scaled - u[:, :k] @ np.diag(s[:k])) @ v[:k]
        case UoraSpec() | VeraSpec() as frames:
            init = frames.init if isinstance(frames, UoraSpec) else "kaiming"
            size_out, size_in = w0.shape
            w = np.ones(frames.r) if weight is None else np.asarray(weight, dtype=np.float64)
            a, b_rows = (
                np.diag(w) @ frame(FrameKey(frames.frame_seed, side, 0, frames.r, size, init))
                + np.diag(1 - w) @ frame(FrameKey(frames.frame_seed, side, 1, frames.r, size, init))
                for side, size in (("A", size_in), ("B", size_out))
            )
            return np.diag(n["b"]) @ b_rows.T @ np.diag(n["d"]) @ a
