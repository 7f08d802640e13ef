"""Products with weights that are laid out once give what torch's own give, on whatever processor this is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from uora.serving.products import product

#: Of a sum of 96 products of standard normals, each rounded.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (33, 96), (2, 5, 96)])
def test_it_is_the_linear_layer(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 40, generator=draw).to(dtype).T  # not contiguous, as a Conv1D's is
    offset = torch.randn(40, generator=draw).to(dtype) if bias else None
    x = torch.randn(shape, generator=draw).to(dtype)
    with torch.inference_mode():
        found = product(weight, offset)(x)
    assert found.dtype == dtype
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=TOLERANCES[dtype])
