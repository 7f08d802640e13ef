"""Rows end to end against rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.tiny import make_tiny_llama
from uora.data import IGNORED, Example
from uora.models import LocalModel, load_model
from uora.training import packing
from uora.training.packing import Group, Packed, Packer, make_packer, pack, packed_attention, shared_prefix

VOCABULARY = 60


def make_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def example(ids: Sequence[int], prompt: int) -> Example:
    """Learned after ``prompt`` tokens."""
    return Example(list(ids), [IGNORED] * prompt + list(ids[prompt:]))


@st.composite
def rows(draw: st.DrawFn) -> list[Example]:
    """Rows that begin alike, mostly."""
    common = draw(st.lists(st.integers(0, 5), max_size=6))
    own = st.lists(st.integers(0, 5), min_size=2, max_size=7)
    found = []
    for rest in draw(st.lists(own, min_size=1, max_size=5)):
        ids = common + rest
        found.append(example(ids, draw(st.integers(1, len(ids) - 1))))
    return found


def logits_alone(model: nn.Module, ids: list[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


def logits_packed(model: Any, groups: Sequence[Sequence[Example]], *, share: bool) -> list[Tensor]:
    """Logits of each row, from the packed ones."""
    piece = pack(groups, share_prefix=share)
    piece.pop("labels")
    logits = model(**piece).logits[0]
    layout: Packed = piece["packed"]
    found = []
    for group, place in layout.slices():
        own = logits[place]
        start = group.prefix
        for length in group.lengths:
            found.append(torch.cat([own[: group.prefix], own[start : start + length]]))
            start += length
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=3), st.booleans())
def test_each_row_has_the_logits_that_it_has_alone(groups: list[list[Example]], share: bool) -> None:
    model = make_llama()
    expected = [logits_alone(model, row.input_ids) for group in groups for row in group]
    model.set_attn_implementation(packing.PACKED_ATTENTION)
    for found, alone in zip(logits_packed(model, groups, share=share), expected, strict=True):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(rows())
def test_a_shared_prefix_keeps_what_is_learned(examples: list[Example]) -> None:
    """Every row keeps its learned tokens and the position before the first of them, once."""
    prefix = shared_prefix(examples)
    assert all(row.input_ids[:prefix] == examples[0].input_ids[:prefix] for row in examples)
    piece = pack([examples], share_prefix=True)
    labels, ids = piece["labels"][0].tolist(), piece["input_ids"][0].tolist()
    learned = [label for row in examples for label in row.labels[1:] if label != IGNORED]
    assert [label for label in labels if label != IGNORED] == learned
    (group,) = piece["packed"].groups
    starts = [prefix + sum(group.lengths[:i]) for i in range(len(group.lengths))]
    assert all(labels[start] == IGNORED for start in starts)
    assert len(ids) == group.tokens == len(labels) == piece["position_ids"].shape[1]


def test_a_common_beginning_goes_through_once() -> None:
    examples = [example([7, 8, 9, 1, 2], 4), example([7, 8, 9, 3, 4, 5], 4), example([7, 8, 9, 3], 3)]
    assert shared_prefix(examples) == 2  # the third row predicts its first learned token at the third
    piece = pack([examples], share_prefix=True)
    assert piece["input_ids"].tolist() == [[7, 8, 9, 1, 2, 9, 3, 4, 5, 9, 3]]
    assert piece["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 2, 3]]
    assert piece["packed"] == Packed((Group(2, (3, 4, 2)),))
    assert pack([examples], share_prefix=False)["packed"] == Packed((Group(0, (5, 6, 4)),))


@settings(max_examples=60)
@given(rows(), st.integers(1, 30), st.booleans())
def test_parts_are_bounded_and_complete(examples: list[Example], max_tokens: int, share: bool) -> None:
    packer = Packer(share_prefix=share)
    parts = list(packer.parts(examples, max_tokens=max_tokens))
    assert [row for part in parts for row in part] == examples
    assert all(len(part) == 1 or packer.tokens(part) <= max_tokens for part in parts)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One row, one head a time: q, k, v ``(heads, tokens, size)``, in float64."""
    heads, n, size = q.shape
    out = torch.zeros_like(q)
    for head in range(heads):
        own = head * k.shape[0] // heads
        for i in range(n):
            first = 0 if window is None else max(0, i - window + 1)
            weights = (k[own, first : i + 1] @ q[head, i] / size**0.5).softmax(0)
            out[head, i] = weights @ v[own, first : i + 1]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("written_out", [0, 512])
def test_attention_against_a_loop(window: int | None, written_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, grouped heads, a prefix, and a sliding window."""
    monkeypatch.setattr(packing, "_MAX_KEYS_WRITTEN_OUT", written_out)
    torch.manual_seed(1)
    packed = Packed((Group(4, (2, 5)), Group(0, (3,)), Group(0, (6, 1))))
    tokens = sum(group.tokens for group in packed.groups)
    q = torch.randn(1, 4, tokens, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, tokens, 8, dtype=torch.float64)
    found, _ = packed_attention(nn.Module(), q, k, v, None, scaling=8**-0.5, packed=packed, sliding_window=window)
    for group, place in packed.slices():
        start = place.start + group.prefix
        for length in group.lengths:
            index = [*range(place.start, place.start + group.prefix), *range(start, start + length)]
            expected = reference_attention(q[0][:, index], k[0][:, index], v[0][:, index], window)
            torch.testing.assert_close(found[0, start : start + length], expected.transpose(0, 1)[group.prefix :],
                                       rtol=1e-5, atol=1e-5)  # fmt: skip
            start += length


def test_a_model_is_set_to_packed_attention_if_it_can_be(tmp_path: Path) -> None:
    model = load_model(LocalModel("tiny", make_tiny_llama(tmp_path), "0" * 64), dtype=torch.float32, device="cpu")
    assert make_packer(model) == Packer(share_prefix=True)
    assert model.config._attn_implementation == packing.PACKED_ATTENTION


def test_a_sliding_window_is_kept() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    examples = [example([1, 2, 3, *range(10, 20)], 9), example([1, 2, 3, *range(30, 41)], 9)]
    expected = [logits_alone(model, row.input_ids) for row in examples]
    assert make_packer(model) is not None
    for found, alone in zip(logits_packed(model, [examples], share=True), expected, strict=True):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_rows_of_a_model_with_dropout_keep_their_own_beginnings() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    assert make_packer(GPT2LMHeadModel(config).eval()) == Packer(share_prefix=False)
    assert make_packer(make_llama(attention_dropout=0.1)) == Packer(share_prefix=False)


class _Mixing(LlamaForCausalLM):
    """Lets tokens see each other outside of attention, as recurrent models do."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        found = super().forward(input_ids=input_ids, **kwargs)
        found.logits = found.logits + found.logits.cumsum(dim=1)
        return found


class _Refusing(LlamaForCausalLM):
    """Takes no further arguments."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids)


@pytest.mark.parametrize("kind", [_Mixing, _Refusing])
def test_a_model_that_cannot_be_packed_is_left_as_it_was(kind: type[LlamaForCausalLM]) -> None:
    model = kind(make_llama().config).eval()
    model.set_attn_implementation("sdpa")
    assert make_packer(model) is None
    assert model.config._attn_implementation == "sdpa"


def test_attention_without_a_layout_is_refused() -> None:
    model = make_llama()
    model.set_attn_implementation(packing.PACKED_ATTENTION)
    with pytest.raises(ValueError, match="needs a layout"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
