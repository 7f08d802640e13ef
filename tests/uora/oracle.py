"""The UORA layer and its reinitialisation in NumPy, written from the paper's formulas, sharing no code with the
torch implementation: frames are arguments, and the frames are mutated step by step as the reference algorithm does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """The reference algorithm: A and B are overwritten at every hit, and each layer counts for itself."""

    a: Array
    b_matrix: Array
    a_target: Array
    b_target: Array
    alpha: float
    tau: float
    count_k: int
    layers: int

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.layers, self.a.shape[0]), dtype=int)

    def step(self, d: Array) -> int:
        """One optimizer step's d of all layers, ``(layers, r)``; returns the hits."""
        hits = 0
        for layer in range(self.layers):
            for i in range(self.a.shape[0]):
                if abs(d[layer, i]) < self.tau:
                    self.counts[layer, i] += 1
                    if self.counts[layer, i] % self.count_k == 0:
                        self.a[i, :] = self.alpha * self.a[i, :] + (1 - self.alpha) * self.a_target[i, :]
                        self.b_matrix[:, i] = self.alpha * self.b_matrix[:, i] + (1 - self.alpha) * self.b_target[:, i]
                        hits += 1
        return hits
