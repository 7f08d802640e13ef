"""The algebra of every method, on layers of any size: forward, merge, mixed batch and export share one dW."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.uora import oracle
from tests.uora.toys import PROVENANCE, export
from uora.artifact import Artifact, dumps, loads
from uora.convert import pairs, scale
from uora.methods import attach, load_artifact
from uora.serving.bank import AdapterBank
from uora.spec import METHODS, AdapterSpec, parse_adapter
from uora.svd import BaseWeights

sizes = st.integers(1, 12)


class Layers(NamedTuple):
    """Two linear layers, in -> middle -> out, with an adapter of rank r on each."""

    method: str
    r: int
    size_in: int
    middle: int
    size_out: int
    seed: int

    def base(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        return nn.Sequential(nn.Linear(self.size_in, self.middle), nn.Linear(self.middle, self.size_out, bias=False))

    def spec(self) -> AdapterSpec:
        own = {"lora_alpha": 3.0} if "lora" in self.method else {}
        scope = {"reinit_scope": "layer"} if self.method == "uora" and self.seed % 2 else {}
        return parse_adapter({"method": self.method, "r": self.r, **own, **scope})

    def x(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.size_in, generator=torch.Generator().manual_seed(self.seed))

    def adapter(self, seed: int = 0) -> Artifact:
        """A stored adapter with any numbers."""
        base = self.base()
        model = attach(base, self.spec(), base=BaseWeights.of_model(base))
        stored = loads(export(model, self.spec()))
        draws = np.random.default_rng((self.seed, seed))
        tensors = {
            name: draws.integers(0, 4, tensor.shape).astype(np.int32)
            if name == "hits"
            else (tensor + draws.normal(size=tensor.shape)).astype(np.float32)
            for name, tensor in stored.tensors.items()
        }
        return loads(dumps(Artifact(stored.manifest, tensors)))

    def deltas(self, artifact: Artifact) -> list[oracle.Array]:
        """dW of each layer, ``(out, in)``, from the method's formula."""
        layers = [layer.weight.detach().double().numpy() for layer in self.base()]
        weights = artifact.weights()
        return [
            oracle.update(artifact.manifest.adapter, own, weight, None if weights is None else weights[index])
            for index, ((_, own), weight) in enumerate(zip(artifact.parts(), layers, strict=True))
        ]

    def expected(self, artifact: Artifact | None, rows: int) -> oracle.Array:
        """What the two layers answer, in float64."""
        h = self.x(rows).double().numpy()
        deltas = [0.0, 0.0] if artifact is None else self.deltas(artifact)
        for layer, delta in zip(self.base(), deltas, strict=True):
            bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
            h = h @ (layer.weight.detach().double().numpy() + delta).T + bias
        return np.asarray(h)


layers = st.builds(
    Layers,
    method=st.sampled_from(METHODS),
    r=st.integers(1, 14),
    size_in=sizes,
    middle=sizes,
    size_out=sizes,
    seed=st.integers(0, 10**6),
)


def close(found: torch.Tensor, expected: oracle.Array) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.detach().numpy() / scale, expected / scale, atol=5e-5)


@settings(max_examples=120)
@given(layers)
def test_forward_merge_and_unmerge(case: Layers) -> None:
    artifact, base = case.adapter(), case.base()
    model = load_artifact(base, artifact, base=BaseWeights.of_model(base))
    expected = case.expected(artifact, 3)
    close(model(case.x(3)), expected)
    model.merge_adapter()
    for layer, original, delta in zip(base, case.base(), case.deltas(artifact), strict=True):
        close(layer.base_layer.weight, original.weight.detach().double().numpy() + delta)
    close(model(case.x(3)), expected)
    model.unmerge_adapter()
    for layer, original, delta in zip(base, case.base(), case.deltas(artifact), strict=True):
        rounding = 1e-6 * max(1.0, float(np.abs(delta).max()))
        torch.testing.assert_close(layer.base_layer.weight, original.weight, atol=rounding, rtol=0.0)
    close(model(case.x(3)), expected)


@settings(max_examples=60)
@given(layers)
def test_store_load_identity(case: Layers) -> None:
    artifact, base = case.adapter(), case.base()
    model = load_artifact(base, artifact, base=BaseWeights.of_model(base))
    again = loads(export(model, case.spec()))
    assert again.manifest.digest == artifact.manifest.digest
    for name, tensor in artifact.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)


@settings(max_examples=120)
@given(layers)
def test_export_is_the_same_update(case: Layers) -> None:
    artifact = case.adapter()
    size = scale(artifact)
    found = pairs(artifact, base=BaseWeights.of_model(case.base()))
    for pair, delta in zip(found, case.deltas(artifact), strict=True):
        product = size.alpha / size.rank * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
        np.testing.assert_allclose(product, delta, atol=2e-5 * max(1.0, float(np.abs(delta).max())))
        assert pair.a.shape[0] == pair.b.shape[1] == size.rank


@settings(max_examples=120)
@given(
    layers,
    st.lists(st.one_of(st.none(), st.tuples(st.sampled_from(METHODS), st.integers(0, 1))), min_size=1, max_size=7),
)
def test_mixed_batch_is_row_by_row(case: Layers, owners: list[tuple[str, int] | None]) -> None:
    artifacts = {owner: case._replace(method=owner[0]).adapter(owner[1]) for owner in owners if owner is not None}
    model = case.base()
    bank = AdapterBank(model, base_digest=PROVENANCE.base_digest)
    for artifact in artifacts.values():
        bank.check(artifact.manifest)
        bank.put(artifact)
    with bank.serving([owner and artifacts[owner].manifest.digest for owner in owners]):
        mixed = model(case.x(len(owners)))
    for row, owner in enumerate(owners):
        chosen = None if owner is None else artifacts[owner]
        close(mixed[row], case.expected(chosen, len(owners))[row])
