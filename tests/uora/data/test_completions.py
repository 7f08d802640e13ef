"""Completions: a prompt as served is the beginning of every example that goes on from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from tests.tiny import make_letter_tokenizer, make_tiny_tokenizer
from uora.data import IGNORED, CompletionRow, encode_completion, prompt_ids
from uora.errors import BaseModelError


def with_beginning() -> PreTrainedTokenizerBase:
    """A tokenizer that puts a token before every text, as Llama's does."""
    tokenizer = make_tiny_tokenizer()
    begin = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))],
    )
    return tokenizer


PLAIN, BEGINNING = make_tiny_tokenizer(), with_beginning()
texts = st.text(st.sampled_from(list("  \n\tthe in'é☃")), min_size=1, max_size=12)


@pytest.mark.parametrize("tokenizer", [PLAIN, BEGINNING])
@given(prompt=texts, completion=texts)
def test_the_completion_and_its_end_are_learned(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> None:
    example = encode_completion(CompletionRow(prompt, completion, 1), tokenizer)
    served = prompt_ids(tokenizer, prompt)
    learned = [token for token in example.labels if token != IGNORED]
    assert example.input_ids == served + learned
    assert example.labels == [IGNORED] * len(served) + learned
    assert learned[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learned[:-1]) == completion


@pytest.mark.parametrize("tokenizer", [PLAIN, BEGINNING])
@given(text=texts)
def test_without_a_prompt_the_whole_text_is_learned(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """All but the first token, which nothing comes before."""
    example = encode_completion(CompletionRow("", text, 1), tokenizer)
    begin = prompt_ids(tokenizer, "")
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.input_ids == [*begin, *written, tokenizer.eos_token_id]
    assert example.labels == [IGNORED, *example.input_ids[1:]]
    assert len(begin) == (tokenizer is BEGINNING)


def test_only_the_prompt_begins_a_text() -> None:
    row = CompletionRow("the", "in", 1)
    plain, begun = (encode_completion(row, tokenizer).input_ids for tokenizer in (PLAIN, BEGINNING))
    assert begun == [PLAIN.convert_tokens_to_ids("<|im_start|>"), *plain]


def test_prompt_and_completion_are_not_merged() -> None:
    assert len(PLAIN("the")["input_ids"]) == 1
    assert encode_completion(CompletionRow("t", "he", 1), PLAIN).input_ids[:1] == prompt_ids(PLAIN, "t")


def test_model_that_cannot_learn_to_stop() -> None:
    with pytest.raises(BaseModelError, match="learn to stop") as caught:
        encode_completion(CompletionRow("a", "b", 1), make_letter_tokenizer())
    assert caught.value.code == "no_end_token"
