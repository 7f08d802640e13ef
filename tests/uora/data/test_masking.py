"""Rendering and labels: what is learned is what the assistant says, and serving's prompts are training's beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.tiny import CHATML, make_tiny_tokenizer
from uora.data import (
    IGNORED,
    ChatMessage,
    ChatRow,
    Dataset,
    Example,
    check_length,
    encode_chat,
    encode_rows,
    render,
    template_sha256,
)
from uora.errors import BaseModelError, DataError

TINY = make_tiny_tokenizer()
#: Rewrites the text of earlier turns once a later one follows, as templates of reasoning models do.
FORGETFUL = CHATML.replace(
    "message['content']",
    "('...' if message['role'] == 'assistant' and not loop.last else message['content'])",
)


def row(*turns: str | ChatMessage, line: int = 1) -> ChatRow:
    """User and assistant in turn, unless given as messages."""
    roles = ("user", "assistant")
    made = [
        turn if isinstance(turn, ChatMessage) else ChatMessage(roles[index % 2], turn, trained=bool(index % 2))  # type: ignore[arg-type]
        for index, turn in enumerate(turns)
    ]
    return ChatRow(tuple(made), line)


def as_dicts(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def encode_all(*rows: ChatRow, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    return list(encode_rows(Dataset(rows, ""), lambda row: encode_chat(row, tokenizer)))


def learned_runs(example: Example) -> list[list[int]]:
    """Each unbroken run of labels."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def learned_texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(run)) for run in learned_runs(example)]


def check_example(example: Example, of: ChatRow, tokenizer: PreTrainedTokenizerBase) -> None:
    """The properties that every example has, whatever the conversation."""
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    # Compared as ids: the real tokenizer has no token for some rare bytes, so its texts do not round-trip.
    assert learned_runs(example) == [
        tokenizer(message.content + "<|im_end|>", add_special_tokens=False)["input_ids"]
        for message in of.messages
        if message.trained
    ]
    for index, message in enumerate(of.messages):
        if message.trained:
            prompt = render(tokenizer, as_dicts(of.messages[:index]), add_generation_prompt=True)
            assert example.input_ids[: len(prompt)] == prompt
            assert example.labels[len(prompt)] != IGNORED  # the first token to be generated is learned
            assert example.labels[len(prompt) - 1] == IGNORED


# Whitespace at an answer's ends, and text that looks like the template's, are what goes wrong in practice.
texts = st.text(st.sampled_from(list("  \n\tthe in\r\"'é☃0")), min_size=1, max_size=12) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20
)


@st.composite
def conversations(draw: st.DrawFn) -> ChatRow:
    made = [ChatMessage("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        made.append(ChatMessage("user", draw(texts)))
        made.append(ChatMessage("assistant", draw(texts), trained=draw(st.booleans())))
    return ChatRow(tuple(made), 1)


@given(conversation=conversations())
def test_labels_are_the_assistants_words_and_prompts_are_prefixes(conversation: ChatRow) -> None:
    example = encode_chat(conversation, TINY)
    check_example(example, conversation, TINY)
    assert example.input_ids == render(TINY, as_dicts(conversation.messages), add_generation_prompt=False)
    assert TINY.decode(example.input_ids) == TINY.apply_chat_template(as_dicts(conversation.messages), tokenize=False)


@pytest.mark.smollm2
@given(conversation=conversations())
def test_labels_and_prefixes_with_the_real_tokenizer(
    smollm2_tokenizer: PreTrainedTokenizerBase, conversation: ChatRow
) -> None:
    check_example(encode_chat(conversation, smollm2_tokenizer), conversation, smollm2_tokenizer)


@pytest.mark.smollm2
def test_real_template_as_served(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = smollm2_tokenizer
    prompt = render(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt == tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )


def test_answer_with_leading_spaces_is_not_merged_into_the_prompt() -> None:
    whole = TINY(TINY.apply_chat_template(as_dicts(row("f", "   x").messages), tokenize=False))["input_ids"]
    prompt = render(TINY, as_dicts(row("f").messages), add_generation_prompt=True)
    assert whole[: len(prompt)] != prompt  # the case is real for this tokenizer

    check_example(encode_chat(row("f", "   x"), TINY), row("f", "   x"), TINY)


def test_weight_zero_masks_one_message_only() -> None:
    conversation = row("a", ChatMessage("assistant", "skip", trained=False), "b", "learn")
    assert learned_texts(encode_chat(conversation, TINY), TINY) == ["learn<|im_end|>"]


def test_developer_is_rendered_as_system() -> None:
    rendered = [
        render(TINY, [{"role": role, "content": "x"}, {"role": "user", "content": "y"}], add_generation_prompt=True)
        for role in ("developer", "system")
    ]
    assert rendered[0] == rendered[1]


def test_template_that_rewrites_earlier_turns() -> None:
    """Learning such a turn is refused; the last one, and rows where only it is learned, are fine."""
    tokenizer = make_tiny_tokenizer(chat_template=FORGETFUL)
    with pytest.raises(DataError, match=r"Line 7: .*messages\[1\]") as caught:
        encode_all(row("a", "b"), ChatRow(row("a", "b", "c", "d").messages, line=7), tokenizer=tokenizer)
    assert caught.value.code == "unmaskable_template"

    conversation = row("a", ChatMessage("assistant", "b"), "c", "d")
    assert learned_texts(encode_chat(conversation, tokenizer), tokenizer) == ["d<|im_end|>"]


def test_assistant_message_that_comes_first_cannot_be_learned() -> None:
    first = ChatRow((ChatMessage("assistant", "hi", trained=True), *row("a", "b").messages), line=2)
    with pytest.raises(DataError, match=r"Line 2: .*messages\[0\].*cannot come first") as caught:
        encode_all(first, tokenizer=TINY)
    assert caught.value.code == "unmaskable_template"


@pytest.mark.parametrize("end", ["\n", "<|im_end|> then more"])
def test_template_that_does_not_end_a_turn_is_refused(end: str) -> None:
    tokenizer = make_tiny_tokenizer(chat_template=CHATML.replace("'<|im_end|>' + '\n'", repr(end).replace("\\n", "\n")))
    with pytest.raises(DataError, match="learn to stop") as caught:
        encode_chat(row("a", "b"), tokenizer)
    assert caught.value.code == "unmaskable_template"


def test_template_that_refuses_the_roles_is_the_rows_fault() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = make_tiny_tokenizer(chat_template=strict)
    conversation = ChatRow((ChatMessage("system", "s"), *row("a", "b").messages), line=5)
    with pytest.raises(DataError, match=r"Line 5: .*no system role") as caught:
        encode_all(conversation, tokenizer=tokenizer)
    assert caught.value.code == "template_error"


def test_tokenizer_without_a_template_is_the_models_fault() -> None:
    bare = make_tiny_tokenizer(chat_template=None)
    calls: list[Any] = [
        lambda: template_sha256(bare),
        lambda: render(bare, as_dicts(row("a").messages), add_generation_prompt=True),
        lambda: encode_chat(row("a", "b"), bare),
    ]
    for call in calls:
        with pytest.raises(BaseModelError) as caught:
            call()
        assert caught.value.code == "no_chat_template"


def test_template_hash_follows_the_text() -> None:
    assert template_sha256(TINY) == template_sha256(make_tiny_tokenizer())
    assert template_sha256(TINY) != template_sha256(make_tiny_tokenizer(chat_template=FORGETFUL))


def test_lengths_up_to_the_context_are_accepted() -> None:
    check_length(7, max_tokens=7)
    with pytest.raises(DataError, match=r"the row has 8 tokens; .* takes 7\.") as caught:
        check_length(8, max_tokens=7)
    assert caught.value.code == "example_too_long"
