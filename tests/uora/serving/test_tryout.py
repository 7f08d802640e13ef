"""Which kinds of models the batch computes rightly is tried, not assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import make_tiny_causal, make_tiny_tokenizer
from uora.errors import SpecError
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, check_servable
from uora.serving.tryout import Tryout

CONTEXT = 128
GATED = {"intermediate_size": 96, "num_key_value_heads": 2}
FULL = {"layer_types": ["full_attention"] * 2}
SERVED: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED | {"head_dim": 16},
    "mistral": GATED | {"sliding_window": None},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 96},
    "phi": GATED,
}


def load(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    directory = make_tiny_causal(folder / model_type, model_type, **changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return model


def make_batcher(model: PreTrainedModel, context: int = CONTEXT) -> Batcher:
    return Batcher(model, make_tiny_tokenizer(), AdapterBank(model, base_digest="0" * 64), max_rows=2, context=context)


def try_out(model: PreTrainedModel) -> Batcher:
    check_servable(model)
    return Tryout.of(model, context=CONTEXT).check(lambda: make_batcher(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", SERVED)
def test_models_with_plain_attention_pass(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    model = load(tmp_path, model_type, dtype, **SERVED[model_type])
    tryout = Tryout.of(model, context=CONTEXT)
    batcher = tryout.check(lambda: make_batcher(model))
    assert tryout.difference(batcher) < (1e-5 if dtype is torch.float32 else 0.02)  # far from where it is refused
    assert not batcher.running
    assert batcher.cache_tokens_in_use == 0


@pytest.mark.parametrize(
    ("model_type", "changes", "found"),
    [
        ("gemma2", GATED | FULL | {"head_dim": 16}, "softcap"),
        ("gpt_oss", GATED | FULL | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
        ("bloom", {}, "a relative difference of"),
        ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, "a relative difference of"),
        ("mistral", GATED | {"sliding_window": 16}, "DynamicSlidingWindowLayer"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_another_attention_are_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], found: str, dtype: torch.dtype
) -> None:
    model = load(tmp_path, model_type, dtype, **changes)
    with pytest.raises(SpecError, match=found) as caught:
        try_out(model)
    assert caught.value.code == "base_model_not_servable"
    assert "serves" in caught.value.message
    assert "Choose such a base model" in caught.value.message


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", **GATED)
    next(iter(model.parameters())).data.fill_(torch.nan)
    with pytest.raises(SpecError, match="difference of nan"):
        try_out(model)


@pytest.mark.parametrize("context", [3, 8, 20])
def test_a_short_context_is_tried_in_short(tmp_path: Path, context: int) -> None:
    model = load(tmp_path, "llama", **GATED)
    Tryout.of(model, context=context).check(lambda: make_batcher(model, context))


def test_want_of_memory_is_not_blamed_on_the_model(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", **GATED)

    def build() -> Batcher:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        Tryout.of(model, context=CONTEXT).check(build)
