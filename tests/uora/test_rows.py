"""Mixed batches in PEFT's own terms, which our tuners share: each row of a forward has the adapter named for it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tests.uora.toys import VOCABULARY, artifact_of, llama, output
from uora.errors import AdapterNotFoundError
from uora.methods import load_artifact
from uora.svd import BaseWeights

IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["uora", "osora"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    """Two adapters, of which "default" is active."""
    base = llama()
    weights = BaseWeights.of_model(base)
    model = load_artifact(base, artifact_of(request.param, 1), base=weights)
    load_artifact(model, artifact_of(request.param, 2), base=weights, adapter_name="two")
    return model.eval()


def test_generate_with_rows_of_different_adapters(model: PeftModel) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    names = ["default", "two", "__base__"]
    mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = model.generate(input_ids=IDS[row : row + 1], adapter_names=[name], **options)
        assert mixed[row].tolist() == alone[0].tolist()


def test_unknown_names_lengths_and_modes_are_refused(model: PeftModel) -> None:
    with pytest.raises(AdapterNotFoundError, match="zwo"):
        model(IDS, adapter_names=["default", "zwo", "default"])
    with pytest.raises(AdapterNotFoundError, match="1 names for 3 rows"):
        model(IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="inference only"):
        model.train()(IDS, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge first"):
        model(IDS, adapter_names=["default"] * 3)


def test_a_forward_that_raises_leaves_nothing_behind(model: PeftModel) -> None:
    expected = output(model, IDS)
    assert not torch.equal(output(model, IDS, adapter_names=["two"] * 3), expected)
    with pytest.raises(IndexError):
        model(IDS + 10 * VOCABULARY, adapter_names=["two"] * 3)
    assert torch.equal(output(model, IDS), expected)
