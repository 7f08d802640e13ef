"""The stored form of an adapter: one safetensors file with its manifest in the header. Never pickled.

Its tensors are those of its method (``uora.layout``) and, for a classifier, its head's, named ``head.<parameter>``.
What several adapters share (frames, singular vectors) is not among them: it is rebuilt from the manifest.
``manifest.digest`` covers the manifest and every tensor, so a changed byte anywhere is found before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from uora import layout
from uora.errors import DigestError, FormatError, NewerFormatError, NonFiniteError, ShapeError
from uora.frames import FRAME_VERSION, PROBES, FrameKey
from uora.layout import ModuleShape
from uora.reinit import ReinitRule, weights
from uora.spec import AdapterSpec, OsoraSpec, Task, UoraSpec

FORMAT: Final = "uora-adapter"
#: 2: methods other than uora, tasks other than chat, heads. Everything of format 1 is read as it was.
FORMAT_VERSION = 2
#: Before a head's parameter in the tensors' names.
HEAD = "head."
_HEADER_KEY = "manifest"


class Provenance(BaseModel):
    """What an adapter was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str
    #: SHA-256 over the base model's float32 weights.
    base_digest: str
    #: SHA-256 of the chat template that rendered the data; serving must use the same. None for tasks without one.
    chat_template_sha256: str | None = None
    #: SHA-256 of the training file.
    data_sha256: str


class Manifest(Provenance):
    """Everything but the numbers: with it and them, any machine rebuilds the adapter."""

    format: Literal["uora-adapter"] = FORMAT
    format_version: int = Field(default=FORMAT_VERSION, ge=1)
    frame_version: str = FRAME_VERSION
    adapter: AdapterSpec
    task: Task = "chat"
    modules: tuple[ModuleShape, ...] = Field(min_length=1)
    #: Probes of what it shares with others: frames (``uora.frames``) or singular vectors (``uora.svd``).
    fingerprint: dict[str, list[float]]
    #: Names of a classifier's classes, in the order of its outputs.
    labels: tuple[str, ...] = ()
    #: Shapes of the head's parameters, by their names in the model.
    head: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    #: SHA-256 over this manifest without the field itself, and the tensors.
    digest: str = ""

    @property
    def trainable_parameters(self) -> int:
        """Numbers trained, the head's apart."""
        return layout.trainable_parameters(self.adapter, self.modules)

    @property
    def head_parameters(self) -> int:
        """Numbers of the head."""
        return sum(int(np.prod(shape)) for shape in self.head.values())

    def frame_keys(self) -> set[FrameKey]:
        """Every frame that the adapter uses."""
        return layout.frame_keys(self.adapter, self.modules)

    @classmethod
    def of(cls, provenance: Provenance, **fields: Any) -> Self:
        """A manifest with the fields of ``provenance`` and ``fields``."""
        return cls(**provenance.model_dump(), **fields)


@dataclass(frozen=True)
class Artifact:
    """A manifest and its tensors."""

    manifest: Manifest
    tensors: Mapping[str, NDArray[Any]]

    def parts(self) -> Iterator[tuple[ModuleShape, dict[str, NDArray[np.float32]]]]:
        """Each module with its own numbers, named and shaped as in ``uora.layout``."""
        manifest = self.manifest
        yield from zip(manifest.modules, layout.unpack(manifest.adapter, manifest.modules, self.tensors), strict=True)

    def weights(self) -> NDArray[np.float32] | None:
        """Share w that the start frames still have, per module, ``(modules, r)``; None if nothing was hit."""
        spec = self.manifest.adapter
        if not isinstance(spec, UoraSpec) or not self.tensors["hits"].any():
            return None
        shared_or_own = weights(ReinitRule.of(spec), self.tensors["hits"])
        return np.broadcast_to(shared_or_own, (len(self.manifest.modules), spec.r))

    def head(self) -> dict[str, NDArray[np.float32]]:
        """The head's parameters by their names in the model; empty without one."""
        return {name: self.tensors[HEAD + name] for name in self.manifest.head}


def dumps(artifact: Artifact) -> bytes:
    """Serialise, with the digest filled in.

    Raises:
        ShapeError: the tensors do not fit the manifest.
        NonFiniteError: they hold NaN or infinity.
    """
    _check_tensors(artifact)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in artifact.tensors.items()}
    fields = artifact.manifest.model_dump(mode="json")
    fields["digest"] = _digest(fields, tensors)
    return save(tensors, metadata={_HEADER_KEY: _canonical(fields)})


def loads(data: bytes) -> Artifact:
    """Read an adapter and verify it.

    Raises:
        FormatError: not an adapter.
        NewerFormatError: one that a later release wrote.
        DigestError: a byte has changed since it was written.
        ShapeError: tensors are missing or of another shape.
        NonFiniteError: they hold NaN or infinity.
    """
    header, tensors = _open(data)
    fields = _read_fields(header)
    artifact = Artifact(_parse_manifest(fields), tensors)
    _check_tensors(artifact)
    # Over the fields as they were written: those that later formats add have no part in an older digest.
    found, expected = _digest(fields, tensors), artifact.manifest.digest
    if found != expected:
        raise DigestError(
            f"The adapter's content has digest {found[:16]}..., expected {expected[:16]}... as its manifest "
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


def _read_fields(header: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(header)
        version = fields["format_version"]
        if fields["format"] != FORMAT or not isinstance(version, int):
            raise FormatError(f"Expected format {FORMAT!r}, found {fields['format']!r} version {version!r}.")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"The adapter's manifest cannot be read: {error}") from error
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"The adapter has format version {version}; this release reads up to {FORMAT_VERSION}. Update it."
        )
    if fields.get("frame_version") != FRAME_VERSION:
        raise FormatError(f"Expected frames {FRAME_VERSION!r}, found {fields.get('frame_version')!r}.")
    return fields


def _parse_manifest(fields: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise FormatError(f"The adapter's manifest cannot be read: {error}") from error


def _check_tensors(artifact: Artifact) -> None:
    manifest, tensors = artifact.manifest, artifact.tensors
    float32 = np.dtype(np.float32)
    expected = layout.shapes(manifest.adapter, manifest.modules)
    expected |= {HEAD + name: (shape, float32) for name, shape in manifest.head.items()}
    if tensors.keys() != expected.keys():
        raise ShapeError(f"Expected the tensors {sorted(expected)}, found {sorted(tensors)}.")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ShapeError(f"Tensor {name!r}: expected {shape} {dtype}, found {tensor.shape} {tensor.dtype}.")
        if not np.isfinite(tensor).all():
            raise NonFiniteError(
                f"Tensor {name!r} holds NaN or infinity, expected finite numbers; the training diverged. Train with a "
                "lower learning rate."
            )
    if "hits" in tensors and (tensors["hits"] < 0).any():
        raise ShapeError("The hit counts hold negative numbers; the adapter is damaged.")


def _digest(fields: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(_canonical({name: fields[name] for name in fields if name != "digest"}).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}|{tensor.dtype}|{tensor.shape}|".encode())
        digest.update(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def stored_bytes(spec: AdapterSpec, modules: Sequence[ModuleShape]) -> int:
    """Size of an adapter's stored form, to a few bytes: the numbers in its manifest have not all the same length."""
    probes = [-1.234567] * PROBES
    names = {key.name for key in layout.frame_keys(spec, modules)}
    if isinstance(spec, OsoraSpec):  # as ``uora.svd`` names them
        names = {f"svd:{module.name.rpartition('.')[2]}" for module in modules}
    manifest = Manifest(
        base_model="base-model", base_digest="0" * 64, chat_template_sha256="0" * 64, data_sha256="0" * 64,
        adapter=spec, modules=tuple(modules), fingerprint=dict.fromkeys(names, probes),
    )  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {_HEADER_KEY: _canonical(manifest.model_dump(mode="json"))}}
    end = 0
    for name, (shape, dtype) in layout.shapes(spec, modules).items():  # none is made: they may be gigabytes
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end
