"""The training forward of a low-rank update against the plain one, and what layers share in it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from uora.delta import delta
from uora.reinit import blend
from uora.tuner.pairs import Segment, SharedProducts, add_mixed, add_pairs, scaled_rows

sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))  # r, in, out
token_counts = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def normal(seed: int, *shape: int, trained: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trained)


def segments_of(counts: list[int]) -> list[Segment]:
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [Segment(start, stop) for start, stop in itertools.pairwise(ends)]


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = normal(99, *output.shape, trained=False).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(sizes, st.integers(1, 6))
def test_one_adapter_is_the_plain_update_with_its_gradients(shape: tuple[int, int, int], tokens: int) -> None:
    r, n_in, n_out = shape
    x, base = normal(0, tokens, n_in).float(), normal(1, tokens, n_out).float()
    a, rows = normal(2, r, n_in, trained=False).float(), normal(3, r, n_out, trained=False).float()
    d, b = normal(4, r).float(), normal(5, n_out).float()
    trained = tuple(t.detach().requires_grad_() for t in (x, base, d, b))
    x, base, d, b = trained

    expected = base + delta(x, a, rows, d, b)
    c = scaled_rows(rows, d, b, dtype=torch.float32)
    found = add_pairs(base.clone(), SharedProducts().project(x, a), [c], [Segment(0, tokens)])

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_equal(gradients(found, *trained), gradients(expected, *trained))


@given(sizes, token_counts)
def test_several_adapters_are_each_on_its_own_tokens(shape: tuple[int, int, int], counts: list[int]) -> None:
    """Both ways to do it, against a loop over the adapters."""
    r, n_in, n_out = shape
    tokens, n = sum(counts), len(counts)
    leaves = [normal(i, *s).float().detach().requires_grad_() for i, s in enumerate(
        [(tokens, n_in), (tokens, n_out), (n, r), (n, n_out)]
    )]  # fmt: skip
    x, base, d, b = leaves
    a, rows = normal(8, r, n_in, trained=False).float(), normal(9, r, n_out, trained=False).float()
    segments = segments_of(counts)

    expected = torch.cat(
        [base[s.start : s.stop] + delta(x[s.start : s.stop], a, rows, d[i], b[i]) for i, s in enumerate(segments)]
    )
    owners = torch.arange(n).repeat_interleave(torch.tensor(counts))
    mixed = add_mixed(base.clone(), F.linear(x, a), rows, d, b, owners)
    cs = [scaled_rows(rows, own_d, own_b, dtype=torch.float32) for own_d, own_b in zip(d, b, strict=True)]
    paired = add_pairs(base.clone(), F.linear(x, a), cs, segments)

    expected_gradients = gradients(expected, *leaves)
    for found in (mixed, paired):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert_equal(gradients(found, *leaves), expected_gradients)


@given(sizes, token_counts)
def test_adapters_that_were_hit_have_each_its_own_blend_of_the_frames(
    shape: tuple[int, int, int], counts: list[int]
) -> None:
    """Against a loop over the adapters, each with its blended frames."""
    r, n_in, n_out = shape
    tokens, n = sum(counts), len(counts)
    x, base, d, b = leaves = [normal(i, *s).float().detach().requires_grad_() for i, s in enumerate(
        [(tokens, n_in), (tokens, n_out), (n, r), (n, n_out)]
    )]  # fmt: skip
    a, rows = normal(8, 2, r, n_in, trained=False).float(), normal(9, 2, r, n_out, trained=False).float()
    share = torch.rand(n, r, generator=torch.Generator().manual_seed(10))

    expected = torch.cat(
        [
            base[s.start : s.stop] + delta(x[s.start : s.stop], blend(*a, share[i]), blend(*rows, share[i]), d[i], b[i])
            for i, s in enumerate(segments_of(counts))
        ]
    )
    owners = torch.arange(n).repeat_interleave(torch.tensor(counts))
    found = add_mixed(base.clone(), F.linear(x, a.flatten(0, 1)), rows.flatten(0, 1), d, b, owners, share)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_equal(gradients(found, *leaves), gradients(expected, *leaves))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_one_adapters_broken_numbers_do_not_reach_the_others(broken: float) -> None:
    d, b = torch.ones(2, 3, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    z = torch.ones(6, 3, requires_grad=True)
    poisoned = z * torch.tensor([1.0, 1, 1, broken, broken, broken])[:, None]
    owners = torch.tensor([0, 0, 0, 1, 1, 1])
    found = add_mixed(torch.zeros(6, 4), poisoned, torch.ones(3, 4), d, b, owners)
    of_d, of_b = torch.autograd.grad(found.sum(), (d, b))
    assert found[:3].isfinite().all()
    assert of_d[0].isfinite().all()
    assert of_b[0].isfinite().all()
    assert not of_b[1].isfinite().all()


class _Counted:
    """How many products are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products = 0
        linear = F.linear

        def counted(*args: Any) -> Tensor:
            self.products += 1
            return linear(*args)

        monkeypatch.setattr("uora.tuner.pairs.F.linear", counted)


def test_a_product_is_made_once_for_the_same_input(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, shared = _Counted(monkeypatch), SharedProducts()
    x, a, other = torch.ones(2, 3, requires_grad=True) * 1, torch.ones(4, 3), torch.ones(5, 3)
    first = shared.project(x, a)
    assert shared.project(x, a) is first
    assert shared.project(x, other).shape == (2, 5)
    assert shared.project(x, a) is first
    assert counted.products == 2


def test_a_product_is_made_anew_for_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, shared = _Counted(monkeypatch), SharedProducts()
    x, a = torch.ones(2, 3), torch.ones(4, 3)
    shared.project(x, a)
    shared.project(x.clone(), a)  # an equal tensor is another one
    shared.project(x, a)
    x.add_(1)
    torch.testing.assert_close(shared.project(x, a), torch.full((2, 4), 6.0))
    with torch.no_grad():
        shared.project(x, a)
    shared.clear()
    with torch.no_grad():
        shared.project(x, a)
    copy.deepcopy(shared).project(x, a)
    assert counted.products == 7


def test_vectors_scale_the_frame_in_float32() -> None:
    """Rounded once: bfloat16 products of three factors would be off by up to three roundings."""
    rows, d, b = (normal(i, *s, trained=False).float() for i, s in enumerate([(4, 8), (4,), (8,)]))
    found = scaled_rows(rows, d, b, dtype=torch.bfloat16)
    assert (found == (d[:, None] * rows * b).bfloat16()).all()
