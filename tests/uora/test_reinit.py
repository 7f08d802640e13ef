"""Reinitialisation: the closed form equals the reference algorithm, and is a pure function of the numbers of hits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.uora import oracle
from uora.frames import FrameKey, frame
from uora.reinit import ReinitRule, blend, count_hits, hits_shape, weights
from uora.spec import UoraSpec

#: d is drawn from -1..1 below, so about half of it counts.
TAU = 0.5


@st.composite
def specs(draw: st.DrawFn) -> UoraSpec:
    """Every kind of rule."""
    quantile = draw(st.one_of(st.none(), st.floats(0.01, 0.99)))
    return UoraSpec(
        r=draw(st.integers(1, 9)),
        alpha=draw(st.floats(0.0, 1.0)),
        tau=TAU,
        count_k=draw(st.integers(1, 3)),
        reinit_scope=draw(st.sampled_from(["shared", "layer"])),
        dynamic_alpha=draw(st.booleans()),
        tau_quantile=quantile,
        reinit_interval=None if quantile is None else draw(st.integers(1, 3)),
        frame_seed=draw(st.integers(0, 1000)),
    )


def _pair(spec: UoraSpec, generation: int, size_in: int, size_out: int) -> tuple[oracle.Array, oracle.Array]:
    a = frame(FrameKey(spec.frame_seed, "A", generation, spec.r, size_in))
    b_rows = frame(FrameKey(spec.frame_seed, "B", generation, spec.r, size_out))
    return a.astype(float), b_rows.T.astype(float)


def _reference(spec: UoraSpec, layers: int, size_in: int, size_out: int) -> oracle.Mutating:
    a, b_matrix = _pair(spec, 0, size_in, size_out)
    a_target, b_target = _pair(spec, 1, size_in, size_out)
    shared = spec.reinit_scope == "shared"
    return oracle.Mutating(
        a=[a] * layers if shared else [a.copy() for _ in range(layers)],
        b_matrix=[b_matrix] * layers if shared else [b_matrix.copy() for _ in range(layers)],
        a_target=a_target,
        b_target=b_target,
        alpha=spec.alpha,
        count_k=spec.count_k,
        tau=spec.tau,
        dynamic_alpha=spec.dynamic_alpha,
        tau_quantile=spec.tau_quantile,
        reinit_interval=spec.reinit_interval or 1,
    )


@settings(deadline=None, max_examples=200)
@given(
    spec=specs(),
    size_in=st.integers(1, 12),
    size_out=st.integers(1, 12),
    layers=st.integers(1, 3),
    steps=st.integers(1, 24),  # a dynamic alpha reaches its floor after 10 hits
)
def test_closed_form_is_the_reference_algorithm(
    spec: UoraSpec, size_in: int, size_out: int, layers: int, steps: int
) -> None:
    reference, rule = _reference(spec, layers, size_in, size_out), ReinitRule.of(spec)
    counts = np.zeros((layers, spec.r), dtype=np.int64)
    stored = np.zeros(hits_shape(spec, layers), dtype=np.int64)
    draws = np.random.default_rng(spec.frame_seed)
    for step in range(1, steps + 1):
        d = draws.uniform(-1, 1, (layers, spec.r)).astype(np.float32)
        counts, hits = count_hits(rule, np.abs(d), counts, step)
        stored += hits if stored.ndim == 2 else hits.sum(axis=0)
        assert hits.sum() == reference.step(d)
    np.testing.assert_array_equal(counts, reference.counts)
    share = weights(rule, stored)
    assert share.shape == ((layers, spec.r) if spec.reinit_scope == "layer" else (spec.r,))
    (a0, b0), (a1, b1) = (_pair(spec, generation, size_in, size_out) for generation in (0, 1))
    for layer, own in enumerate(np.broadcast_to(share, (layers, spec.r))):
        np.testing.assert_allclose(blend(a0, a1, own), reference.a[layer], atol=1e-6)
        np.testing.assert_allclose(blend(b0.T, b1.T, own).T, reference.b_matrix[layer], atol=1e-6)


@settings(deadline=None)
@given(spec=specs(), layers=st.integers(1, 3), seed=st.integers(0, 1000))
def test_weights_depend_on_the_numbers_of_hits_alone(spec: UoraSpec, layers: int, seed: int) -> None:
    draws, shape = np.random.default_rng(seed), hits_shape(spec, layers)
    history = draws.integers(0, 2, (12, *shape))
    for order in (np.arange(12), draws.permutation(12)):
        np.random.seed(int(draws.integers(1000)))  # no global generator has a say
        found = weights(ReinitRule.of(spec), history[order].sum(axis=0))
        np.testing.assert_array_equal(found, weights(ReinitRule.of(spec), history.sum(axis=0)))
    none = weights(ReinitRule.of(spec), np.zeros(shape, dtype=np.int64))
    np.testing.assert_array_equal(none, np.ones_like(none))


def test_counting_leaves_its_arguments() -> None:
    counts, magnitudes = np.zeros((1, 3), dtype=np.int64), np.array([[0.0, 1.0, 0.2]], dtype=np.float32)
    new_counts, hits = count_hits(ReinitRule(alpha=0.5, tau=0.5, count_k=2), magnitudes, counts, 1)
    assert counts.tolist() == [[0, 0, 0]]
    assert new_counts.tolist() == [[1, 0, 1]]
    assert hits.tolist() == [[0, 0, 0]]  # count_k = 2: the second count is the first hit


def test_tau_is_exclusive() -> None:
    magnitudes = np.array([[0.25, 0.2499]], dtype=np.float32)
    _, hits = count_hits(ReinitRule(alpha=0.5, tau=0.25, count_k=1), magnitudes, np.zeros((1, 2), dtype=np.int64), 1)
    assert hits.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("quantile", "step", "expected"),
    [
        (0.5, 1, [[0, 0, 0], [0, 0, 0]]),  # not a multiple of the interval
        (0.5, 2, [[1, 0, 1], [1, 0, 0]]),  # 3 of 6: all layers are one pool, and of equal ones the first counts
        (0.01, 2, [[1, 0, 0], [0, 0, 0]]),  # at least one
    ],
)
def test_quantile_takes_the_smallest(quantile: float, step: int, expected: list[list[int]]) -> None:
    rule = ReinitRule(alpha=0.5, tau=9.0, count_k=1, tau_quantile=quantile, reinit_interval=2)
    magnitudes = np.array([[0.1, 0.9, 0.3], [0.3, 0.8, 0.3]], dtype=np.float32)
    _, hits = count_hits(rule, magnitudes, np.zeros((2, 3), dtype=np.int64), step)
    assert hits.tolist() == expected


def test_dynamic_alpha_decays_with_a_layers_own_counts() -> None:
    rule = ReinitRule(alpha=0.9, tau=1e-5, count_k=2, dynamic_alpha=True, scope="layer")
    hits = np.array([[0, 1, 2, 5, 10**9]])  # counts 2, 4, 6, 8, ... at the hits
    expected = [1.0, 0.8, 0.8 * 0.7, 0.8 * 0.7 * 0.6 * 0.5 * 0.5, 0.0]
    np.testing.assert_allclose(weights(rule, hits), [expected], rtol=1e-6)
    shared = ReinitRule(alpha=0.9, tau=1e-5, count_k=2, dynamic_alpha=True)
    # Two layers with one hit each: either takes its first step, 0.8, where one layer's two hits take 0.8 and 0.7.
    np.testing.assert_allclose(weights(shared, np.array([[1, 2], [1, 0]])), [0.64, 0.56], rtol=1e-6)


def test_blend_is_the_same_in_torch() -> None:
    start, target = (frame(FrameKey(0, "A", generation, 4, 8)) for generation in (0, 1))
    share = np.array([1.0, 0.5, 0.25, 0.0], dtype=np.float32)
    found = blend(torch.tensor(start), torch.tensor(target), torch.tensor(share))
    np.testing.assert_array_equal(found.numpy(), blend(start, target, share))
