"""How numbers lie in a stored adapter, and how many there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uora import layout
from uora.layout import ModuleShape
from uora.spec import METHODS, AdapterSpec, parse_adapter

modules = st.lists(
    st.builds(ModuleShape, name=st.just("m"), in_features=st.integers(1, 9), out_features=st.integers(1, 9)),
    min_size=1,
    max_size=5,
)
specs = st.builds(
    lambda method, r: parse_adapter({"method": method, "r": r}), st.sampled_from(METHODS), st.integers(1, 12)
)


@given(specs, modules, st.integers(0, 100))
def test_unpacking_is_the_inverse_of_packing(spec: AdapterSpec, shapes: list[ModuleShape], seed: int) -> None:
    draws = np.random.default_rng(seed)
    stored = {name: draws.normal(size=shape) for name, (shape, _) in layout.shapes(spec, shapes).items()}
    parts = list(layout.unpack(spec, shapes, stored))
    packed = layout.pack(spec, parts)
    assert packed.keys() | {"hits"} == stored.keys() | {"hits"}
    for name, tensor in packed.items():
        np.testing.assert_array_equal(tensor, stored[name])


def _query_value(hidden: int, layers: int) -> list[ModuleShape]:
    return [ModuleShape(name=f"{i}", in_features=hidden, out_features=hidden) for i in range(2 * layers)]


ROBERTA_BASE, ROBERTA_LARGE, GPT2_LARGE = _query_value(768, 12), _query_value(1024, 24), _query_value(1280, 36)


@pytest.mark.parametrize(
    ("shapes", "method", "r", "expected"),
    [  # sum(out + r) over the modules, and r (in + out) for LoRA (arXiv 2505.20154, 2106.09685)
        (ROBERTA_BASE, "uora", 8, 18_624),
        (ROBERTA_BASE, "uora", 16, 18_816),
        (ROBERTA_BASE, "uora", 64, 19_968),
        (ROBERTA_LARGE, "uora", 8, 49_536),
        (ROBERTA_LARGE, "uora", 16, 49_920),  # GPT-2 medium has the same shapes
        (GPT2_LARGE, "uora", 16, 93_312),
        (ROBERTA_BASE, "lora", 8, 294_912),
        (ROBERTA_BASE, "olora", 8, 294_912),
        (ROBERTA_BASE, "vera", 8, 18_624),
        (ROBERTA_BASE, "osora", 8, 18_624),
        (ROBERTA_BASE, "osora", 1000, 24 * (768 + 768)),  # a weight has no more singular values than its sides
    ],
)
def test_trainable_parameters(shapes: list[ModuleShape], method: str, r: int, expected: int) -> None:
    assert layout.trainable_parameters(parse_adapter({"method": method, "r": r}), shapes) == expected
