"""Logits for learned tokens only give the loss that all logits give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from uora.data import IGNORED, Example, Scale
from uora.models import LocalModel, load_model
from uora.training.batches import collate, split
from uora.training.loss import (
    ClassLoss,
    LearnedTokenLoss,
    SquaredErrorLoss,
    keeps_masked_logits,
    predicting_positions,
)


@pytest.fixture(scope="module")
def model(tiny_base: LocalModel) -> PreTrainedModel:
    return load_model(tiny_base, dtype=torch.float32, device="cpu")


@st.composite
def batches(draw: st.DrawFn) -> list[Example]:
    """Rows with at least one learned token each and an unlearned first one, as every chat row has."""
    made = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(0, 250), min_size=2, max_size=20))
        learned = draw(st.sets(st.integers(1, len(ids) - 1), min_size=1))
        made.append(Example(ids, [token if i in learned else IGNORED for i, token in enumerate(ids)]))
    return made


@settings(max_examples=30)
@given(examples=batches(), max_tokens=st.sampled_from([1, 16, 1000]))
def test_loss_equals_the_models_own(model: PreTrainedModel, examples: list[Example], max_tokens: int) -> None:
    """Split, unmasked and with few logits, against labels, attention mask and all logits in one pass."""
    batch = collate(examples)
    with torch.no_grad():
        expected = model(**batch)
    predictions = expected.logits[:, :-1].argmax(dim=-1)
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORED

    for masked in (True, False):
        loss = LearnedTokenLoss()
        total = torch.zeros(())
        for piece in split(batch, max_tokens=max_tokens):
            kept = {"logits_to_keep": predicting_positions(piece["labels"])} if masked else {}
            outputs = model(input_ids=piece["input_ids"], **kept)
            total += loss(outputs, piece["labels"], num_items_in_batch=int(learned.sum())).detach()

        assert total.item() == pytest.approx(expected.loss.item(), abs=1e-5)
        assert loss.training.mean_loss == pytest.approx(expected.loss.item(), abs=1e-5)
        assert loss.training.count == learned.sum()
        assert loss.training.accuracy == pytest.approx(
            (predictions == targets)[learned].float().mean().item(), abs=1e-6
        )


def test_gradient_of_the_sum_is_that_of_the_mean() -> None:
    logits = torch.randn(1, 4, 7, requires_grad=True)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 5]])
    LearnedTokenLoss()(CausalLMOutputWithPast(logits=logits), labels, num_items_in_batch=torch.tensor(2)).backward()
    found, logits.grad = logits.grad, None
    torch.nn.functional.cross_entropy(logits[0, 1:3], torch.tensor([3, 5])).backward()
    torch.testing.assert_close(found, logits.grad)


def test_classes_are_counted_by_row() -> None:
    loss = ClassLoss()
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 5.0, 2.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    found = loss(SequenceClassifierOutput(logits=logits), labels, num_items_in_batch=loss.count(labels))
    assert found.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert loss.training.metrics() == pytest.approx({"loss": found.item(), "accuracy": 2 / 3})


def test_numbers_are_learned_on_their_scale_and_counted_in_their_units() -> None:
    scale = Scale(mean=100.0, deviation=20.0)
    loss = SquaredErrorLoss(scale)
    logits = torch.tensor([[0.5], [-1.0], [0.0]], requires_grad=True)
    labels = torch.tensor([120.0, 90.0, 100.0])
    found = loss(SequenceClassifierOutput(logits=logits), labels)
    z = torch.tensor([1.0, -0.5, 0.0])
    assert found.item() == pytest.approx(torch.nn.functional.mse_loss(logits[:, 0], z).item())
    assert loss.training.mean_loss == pytest.approx(400.0 * found.item())
    expected = torch.corrcoef(torch.stack([logits[:, 0].detach(), z]))[0, 1].item()
    assert loss.training.metrics()["pearson"] == pytest.approx(expected)


def test_numbers_that_are_all_the_same_have_no_correlation() -> None:
    loss = SquaredErrorLoss(Scale(0.0, 1.0))
    with torch.no_grad():
        loss(SequenceClassifierOutput(logits=torch.zeros(3, 1)), torch.tensor([1.0, 2.0, 3.0]))
    assert loss.validation.pearson == 0.0


def test_meters_are_separate() -> None:
    loss = LearnedTokenLoss()
    outputs = CausalLMOutputWithPast(logits=torch.zeros(1, 3, 4))
    labels = torch.tensor([[IGNORED, 0, 1]])
    loss(outputs, labels)
    with torch.no_grad():
        loss(outputs, labels)
        loss(outputs, labels)
    assert (loss.training.count, loss.validation.count) == (2, 4)
    assert loss.training.mean_loss == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert loss.training.accuracy == 0.5  # of equal logits, the first wins
    loss.reset_training()
    assert (loss.training.count, loss.validation.count) == (0, 4)


def test_models_that_cannot_skip_logits_are_recognised(model: PreTrainedModel) -> None:
    class WithoutLogitsToKeep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11))

        def forward(self, input_ids: torch.Tensor) -> CausalLMOutputWithPast:
            return self.inner(input_ids)

    class IgnoresIt(WithoutLogitsToKeep):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> CausalLMOutputWithPast:
            return self.inner(input_ids)

    assert keeps_masked_logits(model)
    assert not keeps_masked_logits(WithoutLogitsToKeep())
    assert not keeps_masked_logits(IgnoresIt())
