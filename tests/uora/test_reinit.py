"""Reinitialisation: the closed form equals the reference algorithm, and is a pure function of its counts."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.uora import oracle
from uora.frames import FrameKey, frame
from uora.reinit import ReinitRule, blend, count_hits, weights


@settings(deadline=None, max_examples=60)
@given(
    r=st.integers(1, 9),
    size_in=st.integers(1, 12),
    size_out=st.integers(1, 12),
    layers=st.integers(1, 3),
    steps=st.integers(1, 6),
    alpha=st.floats(0.0, 1.0),
    count_k=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_closed_form_is_the_reference_algorithm(
    r: int, size_in: int, size_out: int, layers: int, steps: int, alpha: float, count_k: int, seed: int
) -> None:
    a0, a1 = (frame(FrameKey(seed, "A", g, r, size_in)) for g in (0, 1))
    b0, b1 = (frame(FrameKey(seed, "B", g, r, size_out)) for g in (0, 1))
    reference = oracle.Mutating(
        a=a0.astype(float), b_matrix=b0.T.astype(float), a_target=a1.astype(float), b_target=b1.T.astype(float),
        alpha=alpha, tau=0.5, count_k=count_k, layers=layers,
    )  # fmt: skip
    rule = ReinitRule(alpha=alpha, tau=0.5, count_k=count_k)
    counts, total = torch.zeros(layers, r, dtype=torch.int64), torch.zeros(r, dtype=torch.int64)
    draws = np.random.default_rng(seed)
    for _ in range(steps):
        d = draws.uniform(-1, 1, (layers, r)).astype(np.float32)
        expected_hits = reference.step(d)
        counts, hits = count_hits(rule, torch.from_numpy(d).abs(), counts)
        total = total + hits
        assert int(hits.sum()) == expected_hits
    np.testing.assert_array_equal(counts.numpy(), reference.counts)
    weight = weights(alpha, total)
    a = blend(torch.from_numpy(a0.copy()), torch.from_numpy(a1.copy()), weight)
    b_rows = blend(torch.from_numpy(b0.copy()), torch.from_numpy(b1.copy()), weight)
    np.testing.assert_allclose(a.numpy(), reference.a, atol=1e-5)
    np.testing.assert_allclose(b_rows.numpy().T, reference.b_matrix, atol=1e-5)


def test_counting_leaves_its_arguments() -> None:
    counts, magnitudes = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0.0, 1.0, 0.2]])
    new_counts, hits = count_hits(ReinitRule(alpha=0.5, tau=0.5, count_k=2), magnitudes, counts)
    assert counts.tolist() == [[0, 0, 0]]
    assert new_counts.tolist() == [[1, 0, 1]]
    assert hits.tolist() == [0, 0, 0]  # count_k = 2: the second count is the first hit


def test_tau_is_exclusive() -> None:
    _, hits = count_hits(ReinitRule(0.5, 0.25, 1), torch.tensor([[0.25, 0.2499]]), torch.zeros(1, 2, dtype=torch.int64))
    assert hits.tolist() == [0, 1]
