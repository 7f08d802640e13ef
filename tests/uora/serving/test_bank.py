"""The bank: any mix of adapters in one batch answers as each adapter alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.uora.toys import PROVENANCE, VOCABULARY, artifact, artifact_of, llama, load, output
from uora.artifact import Artifact
from uora.errors import AdapterNotFoundError, ArtifactError, FingerprintError, ShapeError
from uora.serving.bank import AdapterBank

ARTIFACTS = [
    artifact(1),
    artifact(2, hit=True),
    artifact(3, r=5),
    artifact(4, frame_seed=7, target_modules=["q_proj", "v_proj"]),
    artifact(5, target_modules=["down_proj"]),
    artifact(6, r=40, hit=True),
    artifact(7, reinit_scope="layer", hit=True),
    artifact(8, init="xavier"),
    artifact_of("vera", 9),
    artifact_of("lora", 10),
    artifact_of("lora", 11, targets=("q_proj",), lora_alpha=3),
    artifact_of("olora", 12),
    artifact_of("osora", 13),
]
IDS = torch.randint(0, VOCABULARY, (6, 7), generator=torch.Generator().manual_seed(0))
ALONE = [output(load(item), IDS) for item in ARTIFACTS]
BASE = output(llama(), IDS)


def new_bank() -> tuple[torch.nn.Module, AdapterBank]:
    model = llama()
    return model, AdapterBank(model, base_digest=PROVENANCE.base_digest)


@pytest.fixture(scope="module")
def full() -> tuple[torch.nn.Module, AdapterBank]:
    model, bank = new_bank()
    for item in ARTIFACTS:
        bank.check(item.manifest)
        bank.put(item)
    return model, bank


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.one_of(st.none(), st.integers(0, len(ARTIFACTS) - 1)), min_size=1, max_size=6))
def test_mixed_batch_is_each_adapter_alone(full: tuple[torch.nn.Module, AdapterBank], rows: list[int | None]) -> None:
    model, bank = full
    with bank.serving([None if k is None else ARTIFACTS[k].manifest.digest for k in rows]):
        mixed = output(model, IDS[: len(rows)])
    for row, k in enumerate(rows):
        expected = BASE if k is None else ALONE[k]
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-5, rtol=1e-5)


def test_base_rows_are_bit_exact(full: tuple[torch.nn.Module, AdapterBank]) -> None:
    model, bank = full
    with bank.serving([None] * 6):
        assert torch.equal(output(model, IDS), BASE)
    assert torch.equal(output(model, IDS), BASE)


def test_an_unknown_adapter_and_a_failed_forward_leave_nothing(full: tuple[torch.nn.Module, AdapterBank]) -> None:
    model, bank = full
    with pytest.raises(AdapterNotFoundError), bank.serving(["0" * 64]):
        pass
    with pytest.raises(IndexError), bank.serving([ARTIFACTS[0].manifest.digest] * 6):
        output(model, IDS + 10 * VOCABULARY)
    assert torch.equal(output(model, IDS), BASE)


def test_rows_are_reused_cleanly_and_stacks_grow() -> None:
    model, bank = new_bank()
    draw = random.Random(0)
    resident: list[int] = []
    variants = [artifact(100 + seed, target_modules=draw.choice(["all-linear", ["q_proj"]])) for seed in range(24)]
    alone = [output(load(item), IDS[:1]) for item in variants]
    for _ in range(80):
        if resident and draw.random() < 0.2:
            bank.remove(variants[resident.pop(draw.randrange(len(resident)))].manifest.digest)
        else:
            k = draw.randrange(len(variants))
            bank.put(variants[k])
            resident += [] if k in resident else [k]
        assert len(bank) == len(resident)
    for item in variants:  # more than one chunk of rows
        bank.put(item)
    for k in range(len(variants)):
        with bank.serving([variants[k].manifest.digest]):
            torch.testing.assert_close(output(model, IDS[:1]), alone[k], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    _, bank = new_bank()
    manifest = ARTIFACTS[0].manifest
    with pytest.raises(ArtifactError, match="another base model"):
        bank.check(manifest.model_copy(update={"base_digest": "f" * 64}))
    wrong = manifest.modules[0].model_copy(update={"out_features": 7})
    with pytest.raises(ShapeError, match="trained on"):
        bank.check(manifest.model_copy(update={"modules": (wrong,)}))
    probes = {name: [value + 1 for value in values] for name, values in manifest.fingerprint.items()}
    with pytest.raises(FingerprintError, match="expected"):
        bank.check(manifest.model_copy(update={"fingerprint": probes}))


def test_putting_twice_is_one_row() -> None:
    _, bank = new_bank()
    item: Artifact = ARTIFACTS[0]
    bank.put(item)
    bank.put(item)
    assert len(bank) == 1
