"""Seeded orthonormal frames, the same on every machine (arXiv 2505.20154: uniform orthogonal initialisation).

A frame is the orthogonal factor of a Gaussian matrix, hence uniform (Haar) over orthonormal frames. Its random
numbers come from Philox4x64-10 (Salmon et al., SC 2011), a counter-based generator with published test
vectors, keyed by a SHA-256 of the frame's name; normals by Box-Muller and the QR factorisation are done in
float64, the result is rounded to float32. Nothing here depends on torch or on its generators.

Frames are **nested**: the key does not hold the rank, and column k of an orthogonal factor depends on the first k
columns of its argument only. So while ``r <= n``, ``frame(r=8)`` is the first 8 rows of ``frame(r=64)``, and adapters
of different rank can be served from one matrix.

Other ways to draw a frame's numbers (``FrameInit``) are there for comparison and for VeRA (arXiv 2310.11454). They are
uniform in (-bound, bound):

| init | bound |
|---|---|
| kaiming | ``sqrt(6 / fan_in)``: A (r x in) ``sqrt(6 / in)``, B (out x r) ``sqrt(6 / r)`` (He et al. 2015) |
| xavier | ``sqrt(6 / (n + r))`` (Glorot and Bengio 2010) |
| uniform | 1 |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from uora import diskcache
from uora.errors import FingerprintError
from uora.spec import FrameInit

Side = Literal["A", "B"]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

#: Part of every key: another way to draw frames must have another version.
FRAME_VERSION = "uora-frame-1"
#: Probe projections of one frame in a fingerprint.
PROBES = 4
#: A probe of a wrong frame differs by about sqrt(r); one of the same frame by rounding, below 1e-5.
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True, order=True)
class FrameKey:
    """Names one frame.

    Attributes:
        seed: names the family of frames.
        side: "A" (inputs) or "B" (outputs).
        generation: 0 for the start, 1 for the target of the reinitialisation.
        r: rank, the frame's rows.
        n: features, the frame's columns.
        init: how its numbers are drawn.
    """

    seed: int
    side: Side
    generation: int
    r: int
    n: int
    init: FrameInit = "orthogonal"

    @property
    def name(self) -> str:
        """Short name within an adapter, whose seed, rank and init are known: ``A0:576``."""
        return f"{self.side}{self.generation}:{self.n}"


def frame(key: FrameKey, cache_dir: Path | None = None) -> Float32:
    """Build one frame, or read it from the disk cache.

    Args:
        key: which frame.
        cache_dir: folder of the disk cache; None builds it anew.

    Returns:
        ``(r, n)`` float32, read-only. Orthogonal: with orthonormal rows, or orthonormal columns if ``r > n``.
    """
    if key.r < 1 or key.n < 1 or key.generation < 0:
        raise ValueError(f"expected r >= 1, n >= 1 and generation >= 0, found {key}")
    cached = _read(key, cache_dir) if cache_dir is not None else None
    built = cached if cached is not None else _build(key)
    if cached is None and cache_dir is not None:
        diskcache.write(_cache_path(key, cache_dir), {"frame": built})
    built.flags.writeable = False
    return built


def _build(key: FrameKey) -> Float32:
    match key.init:
        case "orthogonal":
            rows = _orthonormal(_normals(_stream(key), key.r, key.n))
        case "kaiming":
            rows = _uniform(key, bound=math.sqrt(6.0 / (key.n if key.side == "A" else key.r)))
        case "xavier":
            rows = _uniform(key, bound=math.sqrt(6.0 / (key.n + key.r)))
        case "uniform":
            rows = _uniform(key, bound=1.0)
        case _:
            assert_never(key.init)
    return np.ascontiguousarray(rows, dtype=np.float32)


def _stream(key: FrameKey) -> str:
    """Name of a frame's random numbers. It does not hold the rank (frames are nested)."""
    name = f"{FRAME_VERSION}|{key.seed}|{key.side}|{key.generation}|{key.n}"
    return name if key.init == "orthogonal" else f"{name}|{key.init}"


def _uniform(key: FrameKey, *, bound: float) -> Float64:
    uniforms = philox_uniforms(_stream(key), key.r * key.n).reshape(key.r, key.n)
    return bound * (2.0 * uniforms - 1.0)


def _orthonormal(matrix: Float64) -> Float64:
    """Orthonormal rows that span those of a wide matrix, or columns those of a tall one."""
    rows, columns = matrix.shape
    return _orthonormal_columns(matrix.T).T if rows <= columns else _orthonormal_columns(matrix)


def _orthonormal_columns(matrix: Float64) -> Float64:
    """Orthogonal factor of a tall matrix (Householder), signs fixed so that diag(R) > 0."""
    q, r = np.linalg.qr(matrix)
    signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return np.asarray(q * signs, dtype=np.float64)


def _normals(name: str, rows: int, columns: int) -> Float64:
    """Standard normals ``(rows, columns)``; the first rows do not depend on how many follow."""
    even = columns + columns % 2
    uniforms = philox_uniforms(name, rows * even).reshape(rows, even // 2, 2)
    radius = np.sqrt(-2.0 * np.log(uniforms[..., 0]))
    angle = 2.0 * math.pi * uniforms[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(rows, even)[:, :columns]


def philox_uniforms(name: str, count: int) -> Float64:
    """``count`` numbers in (0, 1], 53 bits each, of the Philox4x64-10 stream keyed by SHA-256(name)."""
    digest = hashlib.sha256(name.encode()).digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    # numpy counts up before its first block, so the largest counter makes that block number 0.
    words = np.random.Philox(key=key, counter=2**256 - 1).random_raw(count)
    return ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def fingerprint(keys: Iterable[FrameKey], cache_dir: Path | None = None) -> dict[str, list[float]]:
    """Probe projections ``u^T F v`` of every frame, to recognise the same frames on another machine.

    Returns:
        ``{"A0:576": [4 numbers], ...}``, rounded to 6 decimals.
    """
    return {key.name: list(_probe(key, cache_dir)) for key in sorted(set(keys))}


def check_fingerprint(expected: Mapping[str, list[float]], actual: Mapping[str, list[float]]) -> None:
    """Compare the fingerprint of an adapter with that of the frames built here.

    Raises:
        FingerprintError: a frame is missing or differs by more than ``PROBE_TOLERANCE``.
    """
    for name in sorted(expected.keys() | actual.keys()):
        want, have = expected.get(name), actual.get(name)
        if want is None or have is None or len(want) != len(have):
            raise FingerprintError(f"{name}: the adapter has probes {want}, this machine has {have}.")
        if not all(abs(one - other) <= PROBE_TOLERANCE for one, other in zip(want, have, strict=True)):
            raise FingerprintError(
                f"{name}: found probes {have}, expected {want} (tolerance {PROBE_TOLERANCE}). The adapter was trained "
                "on other frames or singular vectors; serve it with the seed, rank, version and base of its manifest."
            )


@lru_cache(maxsize=64)
def _probe_vectors(r: int, n: int) -> tuple[Float64, Float64]:
    return (
        _normals(f"{FRAME_VERSION}|probe|rows|{r}", PROBES, r),
        _normals(f"{FRAME_VERSION}|probe|columns|{n}", PROBES, n),
    )


@lru_cache(maxsize=4096)
def _probe(key: FrameKey, cache_dir: Path | None) -> tuple[float, ...]:
    left, right = _probe_vectors(key.r, key.n)
    values = np.einsum("pr,rn,pn->p", left, frame(key, cache_dir).astype(np.float64), right, optimize=True)
    return tuple(round(float(value), 6) for value in values)


def _cache_path(key: FrameKey, cache_dir: Path) -> Path:
    init = "" if key.init == "orthogonal" else f"-{key.init}"
    name = f"{FRAME_VERSION}-{key.seed}-{key.side}{key.generation}-{key.r}x{key.n}{init}.safetensors"
    return cache_dir / "frames" / name


def _read(key: FrameKey, cache_dir: Path) -> Float32 | None:
    """The cached frame; None if there is none or if it is damaged, since it can be built again."""
    matrix = (diskcache.read(_cache_path(key, cache_dir)) or {}).get("frame")
    return matrix if matrix is not None and matrix.shape == (key.r, key.n) else None
