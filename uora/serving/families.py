"""What adapters can share in one batch: each family computes the updates of all its rows with the same products.

| family | adapters | shared | a row's own |
|---|---|---|---|
| `FrameFamily` | uora and vera of one seed, rank and draw | frames A, B | d, b, and the target frames' share |
| `SingularFamily` | osora of one rank | U, V of the layer's weight | o, s |
| `PairFamily` | lora and olora of one stored rank | nothing | its pair |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol, Self, assert_never

import numpy as np
import torch
from torch import Tensor

from uora.artifact import Artifact
from uora.convert import scale
from uora.delta import Family
from uora.layout import VERA_INIT, Array, pair_rank
from uora.serving.products import Product, down_product, up_product
from uora.serving.rows import Row, Stack
from uora.spec import AdapterSpec, LoraSpec, OloraSpec, OsoraSpec, UoraSpec, VeraSpec
from uora.svd import BaseWeights, osora_update

#: From ``x (rows, n, in)`` to updates of some modules side by side, ``(rows, n, outs)``, in the dtype of ``x``: a
#: product, to be multiplied by the factor where there is one.
Updates = Callable[[Tensor], tuple[Tensor, Tensor | None]]
#: Tokens up to which the products of several modules with their second frames are one, though half of it is zeros.
_FEW_TOKENS = 64


class FamilyBatch(Protocol):
    """The rows of one family in a batch."""

    def __contains__(self, module: str) -> bool:
        """Whether any row adapts the module."""

    def spread(self, lengths: Sequence[int]) -> Self:
        """Row i repeated ``lengths[i]`` times: as many rows as there are tokens."""

    def updates(self, modules: tuple[str, ...]) -> Updates:
        """The updates of modules that read the same input: asked for once, computed in many steps."""


class ServingFamily(Protocol):
    """Hashable: rows of equal families can be one `FamilyBatch`."""

    #: Whether its rows hold matrices, many times the size of vectors.
    heavy: bool

    def numbers(self, artifact: Artifact) -> dict[str, Tensor]:
        """An adapter's row, float32, as `Row` describes it."""

    def batch(self, rows: Sequence[Row]) -> FamilyBatch:
        """Lay rows side by side. Done when a batch's composition changes, not in its steps."""


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
    heavy = False

    def numbers(self, artifact: Artifact) -> dict[str, Tensor]:
        """d ``(modules, r)``, b, and the target frames' share ``1 - w (modules, r)`` if there were hits.

        The share and not w, so that a row without one, which is zero in a stack, stays with the start frames.
        """
        found = {name: _tensor(artifact.tensors[name]) for name in ("d", "b")}
        weights = artifact.weights()
        return found if weights is None else found | {"share": _tensor(1 - weights)}

    def batch(self, rows: Sequence[Row]) -> FrameBatch:
        """Both frames take part as soon as one row has hits."""
        stack = Stack(rows)
        outs = {name: module.out_features for name, module in stack.shapes.items()}
        b = stack.flat("b", {name: (out,) for name, out in outs.items()})
        d = stack.stacked("d").unsqueeze(2)
        if not stack.has("share"):
            return FrameBatch(self.frames, stack.index, blend=None, scale=d, b=b)
        share = stack.stacked("share")
        blend = torch.stack([1 - share, share], dim=2)
        return FrameBatch(self.frames, stack.index, blend=blend, scale=blend * d, b=b)


class FrameBatch:
    """``b * (B (d * (A x)))`` with each row's own blend of the frames.

    With w the start frames' share, ``A_row = w A0 + (1 - w) A1`` and likewise B, so that both frames of a side are one
    product each::

        s = w * A0 x + (1 - w) * A1 x,    y = b * [B0 B1] [w * d * s, (1 - w) * d * s]
    """

    def __init__(
        self, frames: Family, index: dict[str, int], *, blend: Tensor | None, scale: Tensor, b: dict[str, Tensor]
    ) -> None:
        """
        Args:
            frames: shared by all rows.
            index: the modules' places.
            blend: ``(rows, modules, 2, r)``, w and 1 - w; None if no row has hits.
            scale: ``(rows, modules, frames, r)``, d times the blend.
            b: of each module, ``(rows, out)``.
        """
        self._frames, self._index, self._blend, self._scale, self._b = frames, index, blend, scale, b
        self._repeats: Tensor | None = None
        self._vectors: dict[tuple[str, ...], _FrameVectors] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._index

    def spread(self, lengths: Sequence[int]) -> FrameBatch:
        """Row i repeated ``lengths[i]`` times, which is done layer by layer, where the numbers are needed."""
        spread = copy(self)
        spread._repeats = _repeats(lengths, self._scale.device)
        return spread

    def updates(self, modules: tuple[str, ...]) -> Updates:
        """The product with A is one for all modules, and so is, for few tokens, the one with their Bs."""
        if modules not in self._vectors:
            self._vectors[modules] = self._vectors_of(modules)
        return FrameUpdates(self._frames, self._vectors[modules], self._repeats)

    def _vectors_of(self, modules: tuple[str, ...]) -> _FrameVectors:
        places = [self._index[module] for module in modules]
        blend = None
        if self._blend is not None:
            own = self._blend[:, places].unsqueeze(1)  # (rows, 1, modules, 2, r)
            blend = own[..., :1, :].contiguous(), own[..., 1:, :].contiguous()
        return _FrameVectors(
            outs=tuple(self._b[module].shape[-1] for module in modules),
            blend=blend,
            scale=self._scale[:, places].unsqueeze(1),
            b=torch.cat([self._b[module] for module in modules], dim=-1).unsqueeze(1),
        )


@dataclass(frozen=True)
class _FrameVectors:
    """The numbers of modules that read the same input: their ``outs``, blend, scale and b, as they are multiplied."""

    outs: tuple[int, ...]
    blend: tuple[Tensor, Tensor] | None
    scale: Tensor
    b: Tensor

    def repeat(self, index: Tensor) -> _FrameVectors:
        """Row ``index[i]`` as row i."""
        return self._each(lambda numbers: numbers.index_select(0, index))

    def to(self, dtype: torch.dtype) -> _FrameVectors:
        """In the precision of the layers that they are added to."""
        return self._each(lambda numbers: numbers.to(dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> _FrameVectors:
        blend = None if self.blend is None else (change(self.blend[0]), change(self.blend[1]))
        return _FrameVectors(self.outs, blend, change(self.scale), change(self.b))


class FrameUpdates:
    """The updates of modules that read the same input: two products and four operations around them."""

    def __init__(self, frames: Family, vectors: _FrameVectors, repeats: Tensor | None) -> None:
        self._frames, self._vectors, self._repeats = frames, vectors, repeats
        self._down: Product | None = None
        self._up: dict[bool, Product] = {}  # by whether the tokens are few

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`Updates`."""
        rows, n, _ = x.shape
        if self._down is None:
            self._vectors = self._vectors.to(x.dtype)
            self._down = down_product(self._frames, x.shape[-1], both=self._vectors.blend is not None, like=x)
        own = self._vectors if self._repeats is None else self._vectors.repeat(self._repeats)
        down = self._down(x).view(rows, n, 1, -1, self._frames.r)
        if own.blend is not None:
            start, target = own.blend
            down = torch.addcmul(down[..., :1, :] * start, down[..., 1:, :], target)
        return self._up_of(few=rows * n <= _FEW_TOKENS, like=x)((down * own.scale).flatten(2)), own.b

    def _up_of(self, *, few: bool, like: Tensor) -> Product:
        """From ``(rows, n, modules * frames * r)``."""
        if few not in self._up:
            self._up[few] = self._make_up(few=few, like=like)
        return self._up[few]

    def _make_up(self, *, few: bool, like: Tensor) -> Product:
        outs, both = self._vectors.outs, self._vectors.blend is not None
        if few or len(outs) == 1:
            return up_product(self._frames, outs, both=both, like=like)
        ups = [up_product(self._frames, (out,), both=both, like=like) for out in outs]
        return lambda u: torch.cat([up(part) for up, part in zip(ups, u.chunk(len(ups), dim=-1), strict=True)], dim=-1)


@dataclass(frozen=True)
class SingularFamily:
    """Rows over the singular vectors of the base model's own weights."""

    r: int
    base: BaseWeights = field(compare=False)
    heavy = False

    def numbers(self, artifact: Artifact) -> dict[str, Tensor]:
        """``s - s0 (modules, r)`` and ``o - 1``: zero where nothing is adapted."""
        start = np.stack([_array(self.base.factors(m.name, self.r).s) for m in artifact.manifest.modules])
        return {"s": _tensor(artifact.tensors["s"] - start), "o": _tensor(artifact.tensors["o"] - 1)}

    def batch(self, rows: Sequence[Row]) -> SingularBatch:
        """The vectors side by side."""
        stack = Stack(rows)
        o = stack.flat("o", {name: (module.out_features,) for name, module in stack.shapes.items()})
        s = stack.stacked("s")
        return SingularBatch(self, {name: (o[name], s[:, place]) for name, place in stack.index.items()})


@dataclass(frozen=True)
class SingularBatch:
    """``o * (U (s * (V x))) - U (s0 * (V x))``; of each module o - 1 ``(rows, out)`` and s - s0 ``(rows, r)``."""

    family: SingularFamily
    vectors: dict[str, tuple[Tensor, Tensor]]

    def __contains__(self, module: str) -> bool:
        return module in self.vectors

    def spread(self, lengths: Sequence[int]) -> SingularBatch:
        """Row i repeated ``lengths[i]`` times."""
        index = _repeats(lengths, next(iter(self.vectors.values()))[0].device)
        spread = {name: (o.index_select(0, index), s.index_select(0, index)) for name, (o, s) in self.vectors.items()}
        return SingularBatch(self.family, spread)

    def updates(self, modules: tuple[str, ...]) -> Updates:
        """Every layer has singular vectors of its own."""
        return lambda x: (torch.cat([self._update(module, x) for module in modules], dim=-1), None)

    def _update(self, module: str, x: Tensor) -> Tensor:
        o, s = self.vectors[module]
        factors = self.family.base.factors(module, self.family.r)
        return osora_update(x, factors, o.float() + 1, s.float() + factors.s.to(x.device))


@dataclass(frozen=True)
class PairFamily:
    """Rows with a pair of matrices each."""

    rank: int
    heavy = True

    def numbers(self, artifact: Artifact) -> dict[str, Tensor]:
        """Both matrices, LoRA's scale in b."""
        size = scale(artifact)
        a, b = (_tensor(artifact.tensors[name]) for name in ("lora_a", "lora_b"))
        return {"a": a, "b": b * (size.alpha / size.rank)}

    def batch(self, rows: Sequence[Row]) -> PairBatch:
        """The pairs side by side."""
        stack = Stack(rows)
        a = stack.flat("a", {name: (self.rank, module.in_features) for name, module in stack.shapes.items()})
        b = stack.flat("b", {name: (module.out_features, self.rank) for name, module in stack.shapes.items()})
        return PairBatch({name: (a[name], b[name]) for name in a})


@dataclass(frozen=True)
class PairBatch:
    """``b (a x)``, a product per row; of each module a ``(rows, rank, in)`` and b ``(rows, out, rank)``.

    ``lengths`` are the rows' tokens where a batch is its tokens end to end. Matrices are too large to be repeated for
    every token of a prompt, as vectors are.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    lengths: tuple[int, ...] | None = None

    def __contains__(self, module: str) -> bool:
        return module in self.pairs

    def spread(self, lengths: Sequence[int]) -> PairBatch:
        """Row i repeated ``lengths[i]`` times."""
        return PairBatch(self.pairs, tuple(lengths))

    def updates(self, modules: tuple[str, ...]) -> Updates:
        """No row's product is another's."""
        return lambda x: (torch.cat([self._update(module, x) for module in modules], dim=-1), None)

    def _update(self, module: str, x: Tensor) -> Tensor:
        a, b = (matrix.to(x.dtype) for matrix in self.pairs[module])
        if self.lengths is None or max(self.lengths) == 1:
            return _pair_products(x, a, b)
        parts = [
            _pair_products(own.transpose(0, 1), a[row : row + 1], b[row : row + 1]).transpose(0, 1)
            for row, own in enumerate(torch.split(x, list(self.lengths)))
        ]
        return torch.cat(parts)


def _pair_products(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(rows, n, in)`` to ``(rows, n, out)``."""
    return torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))


def _repeats(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers, each as often as its row is repeated."""
    return torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: the artifact's may be read-only


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()
