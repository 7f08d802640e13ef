"""Frames: orthonormal, seeded, the same in every process, cached without trust."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uora.errors import FingerprintError
from uora.frames import FrameKey, check_fingerprint, fingerprint, frame, philox_uniforms
from uora.spec import FrameInit

INITS = get_args(FrameInit)
each_init = pytest.mark.parametrize("init", INITS)
sizes = st.integers(1, 70)
keys = st.builds(
    FrameKey,
    seed=st.integers(0, 2**63 - 1),
    side=st.sampled_from("AB"),
    generation=st.integers(0, 1),
    r=sizes,
    n=sizes,
)


def test_philox_is_the_published_generator() -> None:
    # Known answer of Philox4x64-10 for counter 0, key 0: Random123's kat_vectors (Salmon et al., SC 2011).
    words = np.random.Philox(key=[0, 0], counter=2**256 - 1).random_raw(4)
    assert [int(word) for word in words] == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(st.text(max_size=20))
def test_uniforms_never_reach_zero(name: str) -> None:
    uniforms = philox_uniforms(name, 256)
    assert uniforms.min() > 0.0
    assert uniforms.max() <= 1.0


@settings(deadline=None)
@given(keys)
def test_orthonormal(key: FrameKey) -> None:
    matrix = frame(key).astype(np.float64)
    assert matrix.shape == (key.r, key.n)
    gram = matrix @ matrix.T if key.r <= key.n else matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(min(key.r, key.n)), atol=1e-6)


@pytest.mark.parametrize(("r", "n"), [(256, 768), (768, 256), (1, 4096)])
def test_orthonormal_at_the_size_of_real_layers(r: int, n: int) -> None:
    matrix = frame(FrameKey(0, "B", 1, r, n)).astype(np.float64)
    gram = matrix @ matrix.T if r <= n else matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(min(r, n)), atol=1e-6)


@settings(deadline=None)
@given(keys)
def test_nested_while_r_fits(key: FrameKey) -> None:
    if key.r < key.n:
        larger = frame(FrameKey(key.seed, key.side, key.generation, key.n, key.n))
        np.testing.assert_allclose(frame(key), larger[: key.r], atol=1e-6)


@pytest.mark.parametrize(
    ("init", "side", "bound"),
    [
        # A is (r, in) and B (out, r), so their fan-in is in and r; r is 64, in and out are 300.
        ("kaiming", "A", math.sqrt(6 / 300)),
        ("kaiming", "B", math.sqrt(6 / 64)),
        ("xavier", "A", math.sqrt(6 / 364)),
        ("xavier", "B", math.sqrt(6 / 364)),
        ("uniform", "A", 1.0),
        ("uniform", "B", 1.0),
    ],
)
def test_uniform_within_the_bound(init: FrameInit, side: str, bound: float) -> None:
    matrix = frame(FrameKey(0, side, 0, 64, 300, init))  # type: ignore[arg-type]
    assert 0.999 * bound < np.abs(matrix).max() <= np.float32(bound)
    assert abs(matrix.mean()) < 0.02 * bound
    assert abs(matrix.var() / (bound**2 / 3) - 1) < 0.02


@pytest.mark.parametrize("init", ["kaiming", "xavier"])
def test_bounds_are_those_of_torch(init: str) -> None:
    # The same functions that PEFT's VeRA and torch have; only the random numbers are ours.
    from torch import empty
    from torch.nn.init import kaiming_uniform_, xavier_uniform_

    for side, shape in (("A", (64, 300)), ("B", (300, 64))):
        theirs = {"kaiming": kaiming_uniform_, "xavier": xavier_uniform_}[init](empty(shape))
        ours = frame(FrameKey(0, side, 0, 64, 300, init))  # type: ignore[arg-type]
        assert abs(np.abs(ours).max() / theirs.abs().max().item() - 1) < 1e-3


def test_uniform_over_orientations() -> None:
    # Haar: the first entry of a unit vector in R^3 is uniform on [-1, 1] (Archimedes), hence mean 0, variance 1/3.
    first = np.array([frame(FrameKey(seed, "A", 0, 1, 3))[0, 0] for seed in range(2000)])
    assert abs(first.mean()) < 0.05
    assert abs(first.var() - 1 / 3) < 0.03


def test_every_argument_counts() -> None:
    base = frame(FrameKey(0, "A", 0, 8, 16))
    others = [FrameKey(1, "A", 0, 8, 16), FrameKey(0, "B", 0, 8, 16), FrameKey(0, "A", 1, 8, 16)]
    others += [FrameKey(0, "A", 0, 8, 16, init) for init in INITS if init != "orthogonal"]
    assert all(np.abs(frame(other) - base).max() > 0.1 for other in others)


@each_init
@pytest.mark.parametrize("threads", ["1", "2"])
def test_same_from_another_process_and_thread_count(threads: str, init: FrameInit) -> None:
    code = (
        "import hashlib; from uora.frames import FrameKey, frame;"
        f"print(hashlib.sha256(frame(FrameKey(7, 'B', 1, 48, 96, {init!r})).tobytes()).hexdigest())"
    )
    env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hashlib.sha256(frame(FrameKey(7, "B", 1, 48, 96, init)).tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("key", "probes"),
    [
        (FrameKey(0, "A", 0, 64, 576), [-5.305243, 10.813544, 2.8831, -4.305275]),
        (FrameKey(0, "A", 0, 64, 576, "kaiming"), [10.617986, -3.43213, -22.244637, -7.117068]),
        (FrameKey(0, "B", 1, 64, 576, "kaiming"), [-18.316695, -42.216368, 15.136563, -14.015864]),
        (FrameKey(0, "A", 0, 64, 576, "xavier"), [-6.68627, -10.983265, -8.386059, -1.482209]),
        (FrameKey(0, "A", 0, 64, 576, "uniform"), [-61.751757, -19.516003, -45.870277, 258.197103]),
    ],
)
def test_pinned_fingerprints(key: FrameKey, probes: list[float]) -> None:
    # Written by the first release that had each: a change here orphans every stored adapter.
    check_fingerprint({key.name: probes}, fingerprint([key]))


def test_wrong_fingerprint_names_both() -> None:
    mine = fingerprint([FrameKey(0, "A", 0, 4, 8)])
    other = fingerprint([FrameKey(1, "A", 0, 4, 8)])
    with pytest.raises(FingerprintError, match=r"A0:8: found probes .* expected"):
        check_fingerprint(mine, other)
    with pytest.raises(FingerprintError, match="None"):
        check_fingerprint(mine, {})


@each_init
def test_cache_is_read_and_damage_is_rebuilt(tmp_path: Path, init: FrameInit) -> None:
    key = FrameKey(0, "A", 0, 4, 8, init)
    fresh = frame(key, tmp_path)
    (path,) = (tmp_path / "frames").iterdir()
    np.testing.assert_array_equal(frame(key, tmp_path), fresh)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    np.testing.assert_array_equal(frame(key, tmp_path), fresh)
    assert path.read_bytes() != bytes(damaged)


def test_the_cache_keeps_inits_apart(tmp_path: Path) -> None:
    keys = [FrameKey(0, "A", 0, 4, 8, init) for init in INITS]
    for key in keys:
        frame(key, tmp_path)
    for key in keys:
        np.testing.assert_array_equal(frame(key, tmp_path), frame(key))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="r >= 1"):
        frame(FrameKey(0, "A", 0, 0, 8))
