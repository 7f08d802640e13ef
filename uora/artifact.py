"""The stored form of an adapter: one safetensors file with its manifest in the header. Never pickled, never a matrix.

Tensors: ``d`` float32 ``(modules, r)``, ``b`` float32 ``(sum of out)`` in the order of ``manifest.modules``, ``hits``
int32 ``(r,)``. Everything else that a layer needs is rebuilt from the manifest's seed. ``manifest.digest`` covers the
manifest and every tensor, so a changed byte anywhere is found before the adapter is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from uora.errors import DigestError, FormatError, ShapeError
from uora.frames import FRAME_VERSION, FrameKey, Side
from uora.spec import AdapterSpec

FORMAT: Final = "uora-adapter"
FORMAT_VERSION = 1
_HEADER_KEY = "manifest"
_DTYPES = {"d": np.dtype(np.float32), "b": np.dtype(np.float32), "hits": np.dtype(np.int32)}


class ModuleShape(BaseModel):
    """One adapted linear layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)


class Provenance(BaseModel):
    """What an adapter was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str
    #: SHA-256 over the base model's float32 weights.
    base_digest: str
    #: SHA-256 of the chat template that rendered the data; serving must use the same.
    chat_template_sha256: str
    #: SHA-256 of the training file.
    data_sha256: str


class Manifest(Provenance):
    """Everything but the vectors: with it and them, any machine rebuilds the adapter."""

    format: Literal["uora-adapter"] = FORMAT
    format_version: int = Field(default=FORMAT_VERSION, ge=1)
    frame_version: str = FRAME_VERSION
    adapter: AdapterSpec
    modules: tuple[ModuleShape, ...] = Field(min_length=1)
    #: Probes of the frames trained on (``uora.frames.fingerprint``).
    fingerprint: dict[str, list[float]]
    metrics: dict[str, float] = Field(default_factory=dict)
    #: SHA-256 over this manifest without the field itself, and the tensors.
    digest: str = ""

    @property
    def trainable_parameters(self) -> int:
        """Numbers trained: r + out per module (arXiv 2505.20154)."""
        return sum(self.adapter.r + module.out_features for module in self.modules)

    def frame_keys(self) -> set[FrameKey]:
        """Every frame that the adapter uses."""
        sides: tuple[tuple[Side, str], ...] = (("A", "in_features"), ("B", "out_features"))
        return {
            FrameKey(self.adapter.frame_seed, side, generation, self.adapter.r, getattr(module, attribute))
            for module in self.modules
            for side, attribute in sides
            for generation in (0, 1)
        }

    @classmethod
    def of(cls, provenance: Provenance, **fields: Any) -> Self:
        """A manifest with the fields of ``provenance`` and ``fields``."""
        return cls(**provenance.model_dump(), **fields)


@dataclass(frozen=True)
class Artifact:
    """A manifest and its tensors ``d``, ``b``, ``hits`` (see the module's text for shapes)."""

    manifest: Manifest
    tensors: Mapping[str, NDArray[Any]]

    def vectors(self) -> Iterator[tuple[ModuleShape, NDArray[np.float32], NDArray[np.float32]]]:
        """Each module with its d ``(r,)`` and b ``(out,)``."""
        start = 0
        for index, module in enumerate(self.manifest.modules):
            end = start + module.out_features
            yield module, self.tensors["d"][index], self.tensors["b"][start:end]
            start = end

    def weight(self) -> NDArray[np.float32]:
        """Share w = alpha ** hits that the start frames still have, ``(r,)``."""
        return np.power(self.manifest.adapter.alpha, self.tensors["hits"].astype(np.float64)).astype(np.float32)


def dumps(artifact: Artifact) -> bytes:
    """Serialise, with the digest filled in.

    Raises:
        ShapeError: the tensors do not fit the manifest, or are not finite.
    """
    _check_tensors(artifact)
    tensors = {name: np.ascontiguousarray(artifact.tensors[name]) for name in _DTYPES}
    manifest = artifact.manifest.model_copy(update={"digest": _digest(artifact.manifest, tensors)})
    return save(tensors, metadata={_HEADER_KEY: _canonical(manifest.model_dump(mode="json"))})


def loads(data: bytes) -> Artifact:
    """Read an adapter and verify it.

    Raises:
        FormatError: not an adapter, or a newer format version.
        DigestError: a byte has changed since it was written.
        ShapeError: tensors are missing, of another shape, or not finite.
    """
    header, tensors = _open(data)
    manifest = _parse_manifest(header)
    artifact = Artifact(manifest, tensors)
    _check_tensors(artifact)
    found = _digest(manifest, tensors)
    if found != manifest.digest:
        raise DigestError(
            f"The adapter's content has digest {found[:16]}..., expected {manifest.digest[:16]}... as its manifest "
            "says. It was changed or damaged after it was written; restore it from a backup or train it again."
        )
    return artifact


def _open(data: bytes) -> tuple[str, dict[str, NDArray[Any]]]:
    """Manifest text and tensors. safetensors' own reader checks the header before we look into it."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"Expected a safetensors file, found something else ({error}).") from error
    if _HEADER_KEY not in metadata:
        raise FormatError("The safetensors file has no adapter manifest; it is not an adapter of this service.")
    return metadata[_HEADER_KEY], tensors


def _parse_manifest(text: str) -> Manifest:
    try:
        fields = json.loads(text)
        version = fields["format_version"]
        if fields["format"] != FORMAT or not isinstance(version, int):
            raise FormatError(f"Expected format {FORMAT!r}, found {fields['format']!r} version {version!r}.")
        if version > FORMAT_VERSION:
            raise FormatError(
                f"The adapter has format version {version}; this release reads up to {FORMAT_VERSION}. Update it."
            )
        if fields["frame_version"] != FRAME_VERSION:
            raise FormatError(f"Expected frames {FRAME_VERSION!r}, found {fields['frame_version']!r}.")
        return Manifest.model_validate(fields)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise FormatError(f"The adapter's manifest cannot be read: {error}") from error


def _check_tensors(artifact: Artifact) -> None:
    manifest, tensors = artifact.manifest, artifact.tensors
    r = manifest.adapter.r
    expected: dict[str, tuple[int, ...]] = {
        "d": (len(manifest.modules), r),
        "b": (sum(module.out_features for module in manifest.modules),),
        "hits": (r,),
    }
    if tensors.keys() != expected.keys():
        raise ShapeError(f"Expected the tensors {sorted(expected)}, found {sorted(tensors)}.")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != _DTYPES[name]:
            raise ShapeError(f"Tensor {name!r}: expected {shape} {_DTYPES[name]}, found {tensor.shape} {tensor.dtype}.")
    if not (np.isfinite(tensors["d"]).all() and np.isfinite(tensors["b"]).all()):
        raise ShapeError("The vectors hold NaN or infinity; the training diverged. Train with a lower learning rate.")
    if (tensors["hits"] < 0).any():
        raise ShapeError("The hit counts hold negative numbers; the adapter is damaged.")


def _digest(manifest: Manifest, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(_canonical(manifest.model_dump(mode="json", exclude={"digest"})).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}|{tensor.dtype}|{tensor.shape}|".encode())
        digest.update(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
