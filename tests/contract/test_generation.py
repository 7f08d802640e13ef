"""The official client against the whole way: api, engine, a real model. The model always goes on with an emoji."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from api.database import make_engine, make_sessions
from api.main import create_app
from api.settings import Settings
from tests.api.support import NO_TLS, RecordingQueue, make_tenant, migrate, register_engine, serve
from tests.tiny import make_tiny_llama, make_tiny_tokenizer
from tests.worker.engine.test_app import make_adapter
from uora.artifact import dumps
from uora.models import fetch
from worker.engine.app import create_app as create_engine

EMOJI = "😀"
#: Ends in the token that the emoji follows.
HI: list[Any] = [{"role": "user", "content": "hi"}]


def make_emoji_model(directory: Path) -> Path:
    """A Llama whose next token follows from the last one alone: the emoji's four bytes go round."""
    make_tiny_llama(directory, max_tokens=128)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    pieces = make_tiny_tokenizer()(EMOJI)["input_ids"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.model.embed_tokens.weight
        head = torch.zeros_like(embeddings)
        for last, following in zip(pieces, [*pieces[1:], pieces[0]], strict=True):
            head[following] = 20 * embeddings[last]
        start = make_tiny_tokenizer()("\n")["input_ids"][0]
        head[pieces[0]] += 20 * embeddings[start]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("whole")
    return Settings(
        _env_file=None,
        home=folder,
        cache_dir=folder / "cache",
        base_models={"emoji": f"path:{make_emoji_model(folder / 'emoji')}"},
        engine_token="token-of-the-whole",
        engine_max_rows=4,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def whole(settings: Settings) -> Iterator[OpenAI]:
    """A client of an api before a real engine."""
    migrate(settings.database_url)
    sessions = make_sessions(make_engine(settings.database_url))
    with sessions.begin() as session:
        key = make_tenant(session, "Acme").key
    with serve(create_engine(settings)) as engine_url:
        register_engine(sessions, engine_url, base_model="emoji")
        with serve(create_app(settings, queue=RecordingQueue())) as url:
            transport = openai.DefaultHttpxClient(verify=NO_TLS)
            yield OpenAI(base_url=f"{url}/v1", api_key=key, http_client=transport, max_retries=0, timeout=60)


def test_a_stream_never_splits_a_character(whole: OpenAI) -> None:
    chat = whole.chat.completions.create(model="emoji", messages=HI, temperature=0, max_tokens=12, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in chat]
    assert [piece for piece in pieces if piece] == [EMOJI] * 3
    legacy = whole.completions.create(model="emoji", prompt="\n", temperature=0, max_tokens=10, stream=True)
    texts = [chunk.choices[0].text for chunk in legacy]
    assert [text for text in texts if text][:2] == [EMOJI] * 2  # and then two bytes of the third


def test_the_whole_answer(whole: OpenAI) -> None:
    answer = whole.completions.create(model="emoji", prompt=["\n", "x\n"], max_tokens=8, temperature=0, n=2)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (index, EMOJI * 2, "length") for index in range(4)
    ]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 32)
    ids: list[list[int]] = make_tiny_tokenizer()(["\n", "x\n"])["input_ids"]
    by_ids = whole.completions.create(model="emoji", prompt=ids, max_tokens=8, temperature=0, n=2)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in answer.choices]
    assert whole.completions.create(model="emoji", prompt="\n", echo=True, max_tokens=4).choices[0].text[:1] == "\n"


def test_stop_bias_and_penalties(whole: OpenAI) -> None:
    stopped = whole.completions.create(model="emoji", prompt="\n", stop=[EMOJI * 2], temperature=0, max_tokens=32)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    token = str(make_tiny_tokenizer()("A")["input_ids"][0])
    biased = whole.chat.completions.create(
        model="emoji", messages=HI, logit_bias={token: 100}, temperature=0, max_completion_tokens=3
    )
    assert biased.choices[0].message.content == "AAA"
    with pytest.raises(openai.BadRequestError) as caught:
        whole.completions.create(model="emoji", prompt="\n", logit_bias={"99999": 1})
    assert (caught.value.code, caught.value.param) == ("invalid_token", "logit_bias")


def test_log_probabilities(whole: OpenAI) -> None:
    chat = whole.chat.completions.create(
        model="emoji", messages=HI, logprobs=True, top_logprobs=2, max_tokens=4, temperature=0
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert bytes(byte for token in logprobs.content for byte in token.bytes or ()).decode() == EMOJI
    assert [len(token.top_logprobs) for token in logprobs.content] == [2] * 4
    legacy = whole.completions.create(model="emoji", prompt="\n", logprobs=1, max_tokens=8, temperature=0)
    found = legacy.choices[0].logprobs
    assert found
    assert found.text_offset == [0, 1, 1, 1, 1, 2, 2, 2]
    assert found.token_logprobs
    assert len(found.token_logprobs) == len(found.tokens or ()) == len(found.top_logprobs or ()) == 8


def test_json(whole: OpenAI) -> None:
    schema = {"type": "object", "properties": {"face": {"const": EMOJI}}, "required": ["face"]}
    schema["additionalProperties"] = False
    answer = whole.chat.completions.create(
        model="emoji",
        messages=HI,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "face", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "") == {"face": EMOJI}


def test_too_long_a_prompt_is_told_by_its_lengths(whole: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        whole.completions.create(model="emoji", prompt="x" * 120, max_tokens=20)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert all(number in caught.value.message for number in ("128", "120", "20"))


def test_an_adapter_comes_along(whole: OpenAI, settings: Settings) -> None:
    base = fetch("emoji", settings.base_models["emoji"], cache_dir=settings.cache_dir)
    artifact = make_adapter(base, seed=1, r=8)
    extra = {"adapter": {"data": base64.b64encode(dumps(artifact)).decode()}}
    plain = whole.chat.completions.with_raw_response.create(model="emoji", messages=HI, max_tokens=4)
    tuned = whole.chat.completions.with_raw_response.create(model="emoji", messages=HI, max_tokens=4, extra_body=extra)
    assert f"adapter={artifact.manifest.digest[:16]}" in tuned.headers["x-uora-provenance"]
    assert "adapter" not in plain.headers["x-uora-provenance"]
    assert plain.parse().system_fingerprint != tuned.parse().system_fingerprint
    with pytest.raises(openai.NotFoundError):
        whole.chat.completions.create(model=artifact.manifest.digest, messages=HI)
