"""Adapters that earlier releases stored are files of this folder; every release must load them and mean the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.uora.toys import llama
from uora.artifact import loads
from uora.convert import pairs, scale
from uora.frames import philox_uniforms
from uora.svd import BaseWeights

FIXTURES = Path(__file__).parent / "fixtures"
STORED = sorted(FIXTURES.glob("*.safetensors"))


def probes(path: Path) -> dict[str, list[float]]:
    """The first outputs of every module's update for an input of ones."""
    artifact = loads(path.read_bytes())
    weights = fixture_weights() if artifact.manifest.adapter.method == "osora" else None
    size = scale(artifact)
    found = {}
    for pair in pairs(artifact, base=weights):
        update = size.alpha / size.rank * pair.b.astype(np.float64) @ pair.a.astype(np.float64).sum(axis=1)
        found[pair.module.name] = [round(float(value), 6) for value in update[:4]]
    return found


def fixture_weights() -> BaseWeights:
    """Those of `fixture_model`."""
    return BaseWeights.of_model(fixture_model())


def fixture_model() -> nn.Module:
    """A base model whose weights depend on no library's generator."""
    model = llama()
    for name, weight in model.state_dict().items():
        numbers = philox_uniforms(f"fixture|{name}", weight.numel()).astype(np.float32) - 0.5
        weight.copy_(weight.new_tensor(numbers).view(weight.shape))
    return model


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_means_what_it_meant(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    assert loads(path.read_bytes()).manifest.digest == expected["digest"]
    found = probes(path)
    assert found.keys() == expected["probes"].keys()
    for module, values in expected["probes"].items():
        np.testing.assert_allclose(found[module], values, atol=1e-4)


def test_every_format_and_method_has_a_fixture() -> None:
    manifests = [loads(path.read_bytes()).manifest for path in STORED]
    assert {manifest.format_version for manifest in manifests} == {1, 2}
    assert {m.adapter.method for m in manifests} == {"uora", "vera", "lora", "olora", "osora"}
    assert any(manifest.head for manifest in manifests)
