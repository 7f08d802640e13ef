"""The stored adapter: bit-exact, self-describing, and refused when anything in it was changed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from tests.uora.toys import artifact
from uora.artifact import Artifact, dumps, loads
from uora.errors import ArtifactError, DigestError, FormatError, NewerFormatError, NonFiniteError, ShapeError

STORED = dumps(artifact(hit=True))


def rewritten(**changes: object) -> bytes:
    """The stored adapter with other manifest fields and its old digest."""
    length = int.from_bytes(STORED[:8], "little")
    manifest = json.loads(json.loads(STORED[8 : 8 + length])["__metadata__"]["manifest"])
    return save(load(STORED), metadata={"manifest": json.dumps(manifest | changes)})


def test_round_trip_is_bit_exact() -> None:
    once = loads(STORED)
    assert dumps(once) == STORED
    assert once.manifest.digest == loads(dumps(once)).manifest.digest
    assert once.manifest.trainable_parameters == once.tensors["d"].size + once.tensors["b"].size


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(STORED) - 1), st.integers(0, 7))
def test_a_changed_bit_is_never_loaded_as_something_else(position: int, bit: int) -> None:
    damaged = bytearray(STORED)
    damaged[position] ^= 1 << bit
    try:
        found = loads(bytes(damaged))
    except ArtifactError:
        return
    assert found.manifest == loads(STORED).manifest  # e.g. the case of a \\u escape: no content changed
    assert all(np.array_equal(found.tensors[n], loads(STORED).tensors[n]) for n in found.tensors)


@given(st.binary(max_size=200))
def test_anything_else_is_a_format_error(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        loads(data)


def test_truncated() -> None:
    with pytest.raises(FormatError):
        loads(STORED[:-1])


def test_changed_vector_and_changed_manifest() -> None:
    damaged = bytearray(STORED)
    damaged[-5] ^= 1
    with pytest.raises(DigestError, match="expected"):
        loads(bytes(damaged))
    with pytest.raises(DigestError):
        loads(rewritten(base_model="another"))


def test_newer_format_and_foreign_files() -> None:
    with pytest.raises(NewerFormatError, match="version 3; this release reads up to 2"):
        loads(rewritten(format_version=3))
    with pytest.raises(FormatError, match="no adapter manifest"):
        loads(save({"d": np.zeros(2, np.float32)}))
    with pytest.raises(FormatError, match="frames"):
        loads(rewritten(frame_version="uora-frame-0"))


def test_shapes_and_finiteness() -> None:
    good = loads(STORED)
    for name, tensor in {
        "d": good.tensors["d"][:, :-1],
        "b": good.tensors["b"].astype(np.float64),
        "hits": -good.tensors["hits"] - 1,
    }.items():
        with pytest.raises(ShapeError):
            dumps(Artifact(good.manifest, {**good.tensors, name: tensor}))
    with pytest.raises(NonFiniteError, match="NaN"):
        dumps(replace(good, tensors={**good.tensors, "d": good.tensors["d"] * np.float32("nan")}))
    with pytest.raises(ShapeError, match="tensors"):
        dumps(replace(good, tensors={"d": good.tensors["d"]}))


def test_an_unknown_method_in_a_manifest() -> None:
    with pytest.raises(FormatError, match="manifest cannot be read"):
        loads(rewritten(adapter={"method": "qora", "r": 4}))
