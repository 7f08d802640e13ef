"""How each method's numbers lie in a stored adapter, and how many of them there are.

| method | per module | trained |
|---|---|---|
| uora, vera | ``d`` (r), ``b`` (out); uora also has ``hits`` (r), or (modules, r) | r + out |
| lora | ``lora_a`` (r, in), ``lora_b`` (out, r) | r (in + out) |
| olora | the same with 2r: the trained pair, then the initial one with B negated | r (in + out) |
| osora | ``s`` (r), ``o`` (out) | min(r, in, out) + out |

Parts of equal size for every module are stacked, the others are flattened and laid end to end, in the order of the
modules. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from uora.frames import FrameKey, Side
from uora.reinit import hits_shape
from uora.spec import AdapterSpec, FrameInit, LoraSpec, OloraSpec, OsoraSpec, UoraSpec, VeraSpec

#: VeRA draws its matrices so (arXiv 2310.11454, section 3.1).
VERA_INIT: FrameInit = "kaiming"

Array = NDArray[Any]


class ModuleShape(BaseModel):
    """One adapted linear layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)


@dataclass(frozen=True)
class _Part:
    """One kind of numbers that every module has, float32."""

    name: str
    shape: Callable[[ModuleShape], tuple[int, ...]]
    stacked: bool = False


def _parts(spec: AdapterSpec) -> tuple[_Part, ...]:
    match spec:
        case UoraSpec(r=r) | VeraSpec(r=r):
            return _Part("d", lambda _: (r,), stacked=True), _Part("b", lambda m: (m.out_features,))
        case LoraSpec() | OloraSpec():
            rank = pair_rank(spec)
            return (
                _Part("lora_a", lambda m: (rank, m.in_features)),
                _Part("lora_b", lambda m: (m.out_features, rank)),
            )
        case OsoraSpec(r=r):
            return _Part("s", lambda _: (r,), stacked=True), _Part("o", lambda m: (m.out_features,))
        case _:
            assert_never(spec)


def pair_rank(spec: LoraSpec | OloraSpec) -> int:
    """Rank of the stored pair."""
    return 2 * spec.r if isinstance(spec, OloraSpec) else spec.r


def shapes(spec: AdapterSpec, modules: Sequence[ModuleShape]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every stored tensor."""
    expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    for part in _parts(spec):
        sizes = [part.shape(module) for module in modules]
        shape = (len(sizes), *sizes[0]) if part.stacked else (sum(map(prod, sizes)),)
        expected[part.name] = shape, np.dtype(np.float32)
    if isinstance(spec, UoraSpec):
        expected["hits"] = hits_shape(spec, len(modules)), np.dtype(np.int32)
    return expected


def pack(spec: AdapterSpec, modules: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Per-module parts, in the order of the modules, to stored tensors; ``hits`` are not among them."""
    return {
        part.name: np.stack([module[part.name] for module in modules])
        if part.stacked
        else np.concatenate([module[part.name].reshape(-1) for module in modules])
        for part in _parts(spec)
    }


def unpack(
    spec: AdapterSpec, modules: Sequence[ModuleShape], tensors: Mapping[str, Array]
) -> Iterator[dict[str, Array]]:
    """Stored tensors to each module's parts, in the order of the modules."""
    parts = _parts(spec)
    ends = {part.name: list(accumulate(prod(part.shape(module)) for module in modules)) for part in parts}
    for index, module in enumerate(modules):
        found = {}
        for part in parts:
            shape = part.shape(module)
            end = ends[part.name][index]
            found[part.name] = tensors[part.name].reshape(-1)[end - prod(shape) : end].reshape(shape)
        yield found


def trainable_parameters(spec: AdapterSpec, modules: Sequence[ModuleShape]) -> int:
    """Numbers trained; check values are in ``tests/uora/test_layout.py``."""
    return sum(_trained(spec, module) for module in modules)


def _trained(spec: AdapterSpec, module: ModuleShape) -> int:
    match spec:
        case UoraSpec(r=r) | VeraSpec(r=r):
            return r + module.out_features
        case LoraSpec(r=r) | OloraSpec(r=r):
            return r * (module.in_features + module.out_features)
        case OsoraSpec(r=r):
            return min(r, module.in_features, module.out_features) + module.out_features
        case _:
            assert_never(spec)


def frame_keys(spec: AdapterSpec, modules: Sequence[ModuleShape]) -> set[FrameKey]:
    """Every frame that an adapter uses; none for the methods without."""
    generations: tuple[int, ...]
    match spec:
        case UoraSpec():
            generations, init = (0, 1), spec.init
        case VeraSpec():
            generations, init = (0,), VERA_INIT
        case _:
            return set()
    sides: set[tuple[Side, int]] = {("A", module.in_features) for module in modules}
    sides |= {("B", module.out_features) for module in modules}
    return {
        FrameKey(spec.frame_seed, side, generation, spec.r, features, init)
        for side, features in sides
        for generation in generations
    }
