"""Singular factors of a base model's own weights, the same on every machine (OSoRA, arXiv 2505.14350)::

    W0 = U diag(S) V        the top r of it: U (out, r), S (r,) descending, V (r, in)

They are worked out in float64 from the float32 weights, the sign of each pair of vectors is fixed, and the result is
rounded to float32. So adapters need not store them: they are made again from the base model, kept in a disk cache, and
recognised by a fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from uora import diskcache
from uora.errors import BaseModelError, TargetError, UnsupportedLayerError
from uora.frames import philox_uniforms
from uora.quantised import keep_weight_layout
from uora.spec import Task

if TYPE_CHECKING:
    from uora.models import LocalModel

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Triplets = tuple[Float64, Float64, Float64]

#: Part of every name in the cache and of every probe: another way to make factors must have another version.
SVD_VERSION = "uora-svd-1"
#: Probe projections per kind of module in a fingerprint.
PROBES = 4
#: Ranks are stored in powers of two from here on, so that adapters of many ranks share a few files.
_SMALLEST_STORED_RANK = 64
#: Below this share of the largest singular value, float64 does not give the vectors to 1e-6: there is no direction.
_ZERO = 1e-9
#: Further vectors that take part in the small problem; the error at its border is theirs.
_OVERSAMPLING = 16
#: Squaring a matrix halves its digits. Above this share of the largest singular value enough are left.
_SQUARABLE = 1e-3


@dataclass(frozen=True, eq=False)
class Factors:
    """The top r singular triplets of a weight ``(out, in)``, float32. Constants: copies of a model share them.

    Attributes:
        u: left vectors as columns, ``(out, r)``.
        s: singular values, descending, ``(r,)``.
        v: right vectors as rows, ``(r, in)``.

    Where the weight has fewer than r directions, the rest is zero.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    _copies: dict[tuple[torch.device, torch.dtype], Factors] = field(default_factory=dict, init=False, repr=False)

    def like(self, x: Tensor) -> Factors:
        """U and V in the device and dtype of ``x``; S stays float32. The copy is kept."""
        slot = (x.device, x.dtype)
        if slot not in self._copies:
            with torch.inference_mode(False):  # an inference tensor could not be used in training later
                self._copies[slot] = Factors(
                    self.u.to(x.device, x.dtype), self.s.to(x.device), self.v.to(x.device, x.dtype)
                )
        return self._copies[slot]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def osora_update(x: Tensor, factors: Factors, o: Tensor, s: Tensor) -> Tensor:
    """OSoRA's update of one linear layer, ``o * (U (s * (V x))) - U (S * (V x))``.

    Computed as ``(o - 1) * (U (s * z)) + U ((s - S) * z)`` with ``z = V x``, which is the same without the difference
    of two large products, of which bfloat16 would leave only noise.

    Args:
        x: activations, ``(..., in)``.
        factors: of the layer's base weight.
        o: output scale, ``(out,)``; or ``(rows, out)`` for ``x`` ``(rows, ..., in)``, one for each row.
        s: singular values, ``(r,)`` or ``(rows, r)``.

    Returns:
        ``(..., out)`` in the dtype of ``x``.
    """
    f = factors.like(x)
    z = F.linear(x, f.v)  # (..., r)
    scaled = F.linear(z * _beside(s, x), f.u) * _beside(o - 1, x)
    return scaled + F.linear(z * _beside(s - f.s, x), f.u)


def _beside(vectors: Tensor, x: Tensor) -> Tensor:
    """``(k,)`` or ``(rows, k)``, shaped to multiply ``(rows, ..., k)`` activations of the dtype of ``x``."""
    middle = (1,) * (x.dim() - 2)
    shape = vectors.shape if vectors.dim() == 1 else (vectors.shape[0], *middle, vectors.shape[-1])
    return vectors.to(x.dtype).view(shape)


def osora_pair(factors: Factors, o: Float32, s: Float32) -> tuple[Float32, Float32]:
    """The same update as LoRA has it, of rank 2r.

    Args:
        factors: of the layer's base weight.
        o: output scale, ``(out,)``.
        s: singular values, ``(r,)``.

    Returns:
        a ``(2r, in)`` and b ``(out, 2r)``, float32, with ``b @ a = diag(o) U diag(s) V - U diag(S) V``.
    """
    u, start, v = factors.u.numpy(), factors.s.numpy(), factors.v.numpy()
    a = np.concatenate([s[:, None] * v, (s - start)[:, None] * v])
    b = np.concatenate([(o - np.float32(1))[:, None] * u, u], axis=1)
    return a, b


def _factorise(weight: Float32, r: int) -> dict[str, Float32]:
    """U, S and V of a weight ``(out, in)``, of rank ``min(r, out, in)``, deterministic."""
    u, s, v = _triplets(weight.astype(np.float64), min(r, *weight.shape))
    signs = np.where(_noise(f"signs|{len(u)}", len(u)) @ u < 0, -1.0, 1.0)
    exists = s > _ZERO * s[0]
    return {
        "u": np.ascontiguousarray(u * (signs * exists), dtype=np.float32),
        "s": (s * exists).astype(np.float32),
        "v": np.ascontiguousarray(v * (signs * exists)[:, None], dtype=np.float32),
    }


def _triplets(matrix: Float64, k: int) -> Triplets:
    """The top ``k`` singular triplets, signs as they come."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, v = _triplets(matrix.T, k)
        return v.T, s, u.T
    u, s, v = _by_squaring(matrix, k) or np.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k], v[:k]


def _by_squaring(matrix: Float64, k: int) -> Triplets | None:
    """The same for a wide matrix from the eigenvectors of ``matrix @ matrix.T``; None where that is slow or inexact.

    The eigenvectors give the space, and the small problem within it (Rayleigh and Ritz) the vectors to full precision.
    On SmolLM2-135M's layers at k = 64 a third of the time of the whole decomposition, and within 1e-12 of it.
    """
    columns = k + _OVERSAMPLING
    if 2 * columns > len(matrix):
        return None
    _, vectors = np.linalg.eigh(matrix @ matrix.T)  # ascending
    space = vectors[:, -columns:]
    u, s, v = np.linalg.svd(space.T @ matrix, full_matrices=False)
    return (space @ u, s, v) if s[k - 1] > _SQUARABLE * s[0] else None


def _noise(name: str, *shape: int) -> Float64:
    """Fixed numbers of mean 0 and variance 1."""
    uniforms = philox_uniforms(f"{SVD_VERSION}|{name}", math.prod(shape))
    return math.sqrt(12.0) * (uniforms.reshape(shape) - 0.5)


def _top(stored: dict[str, Float32], r: int) -> Factors:
    """The first ``r`` of stored triplets, with zeros where there are fewer."""
    missing = max(0, r - len(stored["s"]))
    with torch.inference_mode(False):
        u, s, v = (torch.from_numpy(stored[name]) for name in ("u", "s", "v"))
        return Factors(
            F.pad(u[:, :r], (0, missing)).contiguous(),
            F.pad(s[:r], (0, missing)),
            F.pad(v[:r], (0, 0, 0, missing)),
        )


class BaseWeights:
    """Where the weights of a base model's linear layers come from, and their singular factors.

    Threads may share one: at worst, two of them work the same factors out at the same time.
    """

    def __init__(self, digest: str, source: nn.Module | Callable[[], nn.Module], cache_dir: Path | None = None) -> None:
        """Nothing is read yet.

        Args:
            digest: of the base model's float32 weights; names them in the disk cache, which is not used without.
            source: the base model, with or without adapters on it, or what loads it.
            cache_dir: disk cache, of factors and of frames.
        """
        self.digest = digest
        self.cache_dir = cache_dir
        self._source = source
        self._factors: dict[tuple[str, int], Factors] = {}
        self._probes: dict[tuple[str, int], Float64] = {}

    @classmethod
    def of_model(cls, model: nn.Module, digest: str = "", cache_dir: Path | None = None) -> Self:
        """The weights that a model in memory has.

        Factors of weights that are rounded (bfloat16, quantised) are not written to the disk cache, since the digest
        is that of the exact ones; exact ones that are there already are taken.
        """
        return cls(digest, model.get_base_model() if isinstance(model, PeftModel) else model, cache_dir)

    @classmethod
    def of_local(cls, local: LocalModel, task: Task, cache_dir: Path | None) -> Self:
        """The exact weights of a base model on disk: loaded when something is missing in the cache, freed after."""
        from uora.models import load_model

        return cls(local.digest, lambda: load_model(local, dtype=torch.float32, device="cpu", task=task), cache_dir)

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseWeights:
        """Shared like any cache; but what is copied together with the model it reads, reads the copy."""
        copied = memo.get(id(self._source))
        return BaseWeights(self.digest, copied, self.cache_dir) if isinstance(copied, nn.Module) else self

    def weight(self, name: str) -> Tensor:
        """The weight of one linear layer, float32 ``(out, in)``; errors of `weights`."""
        return next(self.weights([name]))[1]

    def weights(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Names with the weights of those linear layers, float32 ``(out, in)``; the model is loaded once for all.

        Raises:
            TargetError: there is no such module.
            UnsupportedLayerError: it is no linear layer.
            ValueError: an adapter is merged into it.
        """
        model = self._open()
        for name in names:
            weight, _ = _weight_of(model, name)
            yield name, weight

    def _open(self) -> nn.Module:
        return self._source if isinstance(self._source, nn.Module) else self._source()

    def factors(self, name: str, r: int) -> Factors:
        """The top ``r`` singular triplets of the weight of one linear layer; errors of `all_factors`."""
        return self._factors.get((name, r)) or self.all_factors([name], r)[name]

    def all_factors(self, names: Iterable[str], r: int) -> dict[str, Factors]:
        """The factors of many layers: from memory, from the disk cache, and the rest worked out from the weights.

        Raises:
            BaseModelError: a weight holds NaN or infinity.
            TargetError, UnsupportedLayerError, ValueError: as for `weights`.
        """
        names = list(names)
        found = {name: factors for name in names if (factors := self._find(name, r)) is not None}
        missing = [name for name in names if name not in found]
        if missing:
            model = self._open()
            found |= {name: self._make(model, name, r) for name in missing}
        return {name: found[name] for name in names}

    def pair(self, name: str, o: Float32, s: Float32) -> tuple[Float32, Float32]:
        """An adapter's update of one layer as LoRA has it (see `osora_pair`); errors of `all_factors`."""
        return osora_pair(self.factors(name, len(s)), o, s)

    def _find(self, name: str, r: int) -> Factors | None:
        factors = self._factors.get((name, r))
        if factors is None and (path := self._path(name, r)) and (stored := diskcache.read(path)):
            factors = self._keep(name, r, _top(stored, r))
        return factors

    def _make(self, model: nn.Module, name: str, r: int) -> Factors:
        weight, exact = _weight_of(model, name)
        if not torch.isfinite(weight).all():
            raise BaseModelError(
                f"The weight of {name} holds NaN or infinity, expected finite numbers. Fetch the base model again."
            )
        stored = _factorise(weight.numpy(), _stored_rank(r))
        path = self._path(name, r)
        if path and exact:
            diskcache.write(path, stored)
        return self._keep(name, r, _top(stored, r))

    def _path(self, name: str, r: int) -> Path | None:
        if self.cache_dir is None or not self.digest:
            return None
        file = f"{SVD_VERSION}-{quote(name, safe='')}-{_stored_rank(r)}.safetensors"
        return self.cache_dir / "svd" / self.digest / file

    def _keep(self, name: str, r: int, factors: Factors) -> Factors:
        self._factors[name, r] = factors
        return factors

    def fingerprint(self, names: Iterable[str], r: int) -> dict[str, list[float]]:
        """Probes of the factors of many layers, to recognise the same ones on another machine.

        Layers whose names have the same last part are added up, each with numbers of its own: a wrong one shows as
        well as it would alone, and the fingerprint stays short.

        Returns:
            ``{"svd:q_proj": [5 numbers], ...}``, rounded to 6 decimals, for `uora.frames.check_fingerprint`.
        """
        names = list(names)
        unknown = [name for name in names if (name, r) not in self._probes]
        for name, factors in self.all_factors(unknown, r).items():
            self._probes[name, r] = _probe(name, factors)
        sums: dict[str, Float64] = {}
        for name in names:
            kind = f"svd:{name.rpartition('.')[2]}"
            sums[kind] = sums.get(kind, 0.0) + self._probes[name, r]
        return {kind: [round(float(value), 6) for value in sums[kind]] for kind in sorted(sums)}


def _stored_rank(r: int) -> int:
    """The power of two that ``r`` is stored under."""
    return max(_SMALLEST_STORED_RANK, 1 << (r - 1).bit_length())


def _probe(name: str, factors: Factors) -> Float64:
    """``p U diag(c S / S[0]) V q`` for fixed p, c, q, and the logarithm of S's length: 5 numbers.

    c tells vectors apart whose singular values are equal. A common sign of a left and a right vector does not show,
    and does not matter. A wrong vector changes a probe by about 1, rounding by less than 1e-5.
    """
    u, s, v = (tensor.double().numpy() for tensor in (factors.u, factors.s, factors.v))
    (size_out, r), size_in = u.shape, v.shape[1]
    noise = _noise(f"probe|{name}", PROBES, size_out + r + size_in)
    p, c, q = np.split(noise, [size_out, size_out + r], axis=1)
    share = s / s[0] if s[0] > 0 else s
    probes = np.sum((p @ u) * c * share * (q @ v.T), axis=1)
    return np.append(probes, np.log1p(np.linalg.norm(s)))


def _weight_of(model: nn.Module, name: str) -> tuple[Tensor, bool]:
    """A linear layer's weight, float32 ``(out, in)`` on the CPU, and whether it is exact: float32 in the model too."""
    layer = _plain_layer(model, name)
    keep_weight_layout(layer)
    backend = resolve_quantization_backend(layer, **get_quantization_kwargs(model))
    if backend is None and not isinstance(layer, nn.Linear | Conv1D):
        raise UnsupportedLayerError(
            f"Module {name} is a {type(layer).__name__}, expected nn.Linear or Conv1D; choose other targets."
        )
    weight = cast(Tensor, layer.weight if backend is None else backend.get_base_weight(layer))
    exact = backend is None and weight.dtype is torch.float32
    oriented = weight.T if isinstance(layer, Conv1D) else weight
    return oriented.detach().to("cpu", torch.float32), exact


def _plain_layer(model: nn.Module, name: str) -> nn.Module:
    """The base model's own layer inside the wrappers that adapters put around it."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise TargetError(
            f"Found no module {name} in the base model; take names from model.named_modules()."
        ) from error
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        if getattr(module, "merged", False):
            raise ValueError(f"An adapter is merged into {name}, so its base weight is not there; unmerge first.")
        module = inner
    return module
