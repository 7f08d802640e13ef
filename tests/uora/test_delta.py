"""The layer's forward against the NumPy oracle, alone and in a mixed batch."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.uora import oracle
from uora.delta import Family, delta, frame_tensor, mixed_delta
from uora.reinit import ReinitRule, blend, weights
from uora.spec import FrameInit


@settings(deadline=None)
@given(
    r=st.integers(1, 20),  # larger than out included
    size_in=st.integers(1, 16),
    size_out=st.integers(1, 16),
    rows=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_the_oracle(r: int, size_in: int, size_out: int, rows: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    x, w0 = draws.normal(size=(rows, size_in)), draws.normal(size=(size_out, size_in))
    d, b = draws.normal(size=r), draws.normal(size=size_out)
    family, like = Family(seed, r), torch.empty(0)
    a = frame_tensor(family, "A", 0, size_in, like=like)
    b_rows = frame_tensor(family, "B", 0, size_out, like=like)
    expected = oracle.forward(x, w0, a.double().numpy(), b_rows.T.double().numpy(), d, b)
    xt = torch.from_numpy(x).float()
    update = delta(xt, a, b_rows, torch.from_numpy(d), torch.from_numpy(b))
    found = xt @ torch.from_numpy(w0).float().T + update
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=1e-5)
    dense = oracle.merged(w0, a.double().numpy(), b_rows.T.double().numpy(), d, b)
    np.testing.assert_allclose(x @ dense.T, expected, atol=1e-9)


@settings(deadline=None)
@given(
    r=st.integers(1, 9),
    rows=st.integers(1, 5),
    time=st.one_of(st.none(), st.integers(1, 4)),
    hits=st.booleans(),
    init=st.sampled_from(get_args(FrameInit)),
    seed=st.integers(0, 10**6),
)
def test_mixed_batch_is_row_by_row(r: int, rows: int, time: int | None, hits: bool, init: FrameInit, seed: int) -> None:
    torch.manual_seed(seed)
    size_in, size_out = 6, 7
    family, like = Family(seed, r, init=init), torch.empty(0)
    x = torch.randn(rows, size_in) if time is None else torch.randn(rows, time, size_in)
    d, b = torch.randn(rows, r), torch.randn(rows, size_out)
    n = torch.randint(0, 4, (rows, r)) if hits else torch.zeros(rows, r, dtype=torch.int64)
    weight = torch.from_numpy(weights(ReinitRule(alpha=0.5, tau=1e-5, count_k=1, scope="layer"), n.numpy()))
    mixed = mixed_delta(x, family, d=d, b=b, weight=weight if hits else None)
    for row in range(rows):
        a, b_rows = (
            blend(
                frame_tensor(family, side, 0, size, like=like),
                frame_tensor(family, side, 1, size, like=like),
                weight[row],
            )
            for side, size in (("A", size_in), ("B", size_out))
        )
        alone = delta(x[row], a, b_rows, d[row], b[row])
        torch.testing.assert_close(mixed[row], alone, atol=1e-4, rtol=1e-5)  # uniform frames are large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, dtype=dtype)
    found = mixed_delta(x, Family(0, 4), d=torch.ones(2, 4), b=torch.ones(2, 5), weight=None)
    assert found.dtype is dtype
    assert found.shape == (2, 3, 5)
