"""What adapters can share in one batch: each family computes the updates of all its rows with the same products.

| family | adapters | shared | a row's own |
|---|---|---|---|
| `FrameFamily` | uora and vera of one seed, rank and draw | frames A, B | d, b, and the target frames' share |
| `SingularFamily` | osora of one rank | U, V of the layer's weight | o, s |
| `PairFamily` | lora and olora of one stored rank | nothing | its pair |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, assert_never

import numpy as np
import torch
from torch import Tensor

from uora.artifact import Artifact
from uora.convert import scale
from uora.delta import Family, mixed_delta
from uora.layout import VERA_INIT, Array, pair_rank
from uora.spec import AdapterSpec, LoraSpec, OloraSpec, OsoraSpec, UoraSpec, VeraSpec
from uora.svd import BaseWeights, osora_update

#: Name of the only number of a row that it may do without: most adapters have had no hits.
TARGET = "target"


class ServingFamily(Protocol):
    """Hashable: adapters of equal families go into the same stacks."""

    def rows(self, artifact: Artifact) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each module's name with the numbers that the adapter's row has there, float32."""

    def update(self, module: str, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Updates ``(rows, ..., out)`` for activations ``(rows, ..., in)``, in their dtype; ``rows`` as from `rows`,
        with a first dimension for the rows."""


def family_of(spec: AdapterSpec, base: BaseWeights) -> ServingFamily:
    """The family of an adapter."""
    match spec:
        case UoraSpec():
            return FrameFamily(Family(spec.frame_seed, spec.r, base.cache_dir, spec.init))
        case VeraSpec():
            return FrameFamily(Family(spec.frame_seed, spec.r, base.cache_dir, VERA_INIT))
        case OsoraSpec():
            return SingularFamily(spec.r, base)
        case LoraSpec() | OloraSpec():
            return PairFamily(pair_rank(spec))
        case _:
            assert_never(spec)


@dataclass(frozen=True)
class FrameFamily:
    """Rows over the same frames."""

    frames: Family

    def rows(self, artifact: Artifact) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """d ``(r,)``, b ``(out,)``, and the target frames' share ``1 - w (r,)`` if there were hits.

        The share and not w, so that a row without one, which is zero in the stack, stays with the start frames.
        """
        weights = artifact.weights()
        for index, (module, own) in enumerate(artifact.parts()):
            row = {"d": _tensor(own["d"]), "b": _tensor(own["b"])}
            if weights is not None:
                row[TARGET] = _tensor(1 - weights[index])
            yield module.name, row

    def update(self, module: str, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """``b * (B (d * (A x)))`` with each row's own blend of the frames."""
        weight = 1 - rows[TARGET] if TARGET in rows else None
        return mixed_delta(x, self.frames, d=rows["d"], b=rows["b"], weight=weight)


@dataclass(frozen=True)
class SingularFamily:
    """Rows over the singular vectors of the base model's own weights."""

    r: int
    base: BaseWeights = field(compare=False)

    def rows(self, artifact: Artifact) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """``o - 1 (out,)`` and ``s - s0 (r,)``: zero where nothing is adapted."""
        for module, own in artifact.parts():
            start = self.base.factors(module.name, self.r).s
            yield module.name, {"o": _tensor(own["o"]) - 1, "s": _tensor(own["s"]) - start}

    def update(self, module: str, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """``o * (U (s * (V x))) - U (s0 * (V x))``."""
        factors = self.base.factors(module, self.r)
        return osora_update(x, factors, rows["o"] + 1, rows["s"] + factors.s.to(x.device))


@dataclass(frozen=True)
class PairFamily:
    """Rows with a pair of matrices each."""

    rank: int

    def rows(self, artifact: Artifact) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """a ``(rank, in)`` and b ``(out, rank)``, LoRA's scale in it."""
        size = scale(artifact)
        for module, own in artifact.parts():
            yield module.name, {"a": _tensor(own["lora_a"]), "b": _tensor(own["lora_b"]) * (size.alpha / size.rank)}

    def update(self, module: str, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """``b (a x)``, a product per row."""
        positions = x.reshape(x.shape[0], -1, x.shape[-1])  # (rows, n, in)
        down = torch.bmm(positions, rows["a"].to(x.dtype).transpose(1, 2))
        up = torch.bmm(down, rows["b"].to(x.dtype).transpose(1, 2))
        return up.reshape(*x.shape[:-1], up.shape[-1])


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: the artifact's may be read-only
