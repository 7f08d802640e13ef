"""The engine over HTTP: adapters from a real database, verified, mixed and streamed; what is wrong is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import torch
from peft import get_peft_model
from sqlalchemy import delete, update
from sqlalchemy.orm import Session, sessionmaker

from api.database import Base, make_engine, make_sessions
from api.models.models import Adapter
from api.projects.models import Project
from api.settings import Settings
from tests.api.support import serve, wait_until
from tests.tiny import make_tiny_causal, make_tiny_llama
from tests.uora.toys import randomise, store
from uora.artifact import Artifact, Provenance, dumps, loads
from uora.data import CompletionRow, encode_completion, prompt_ids
from uora.data.templates import template_sha256
from uora.models import LocalModel, fetch, load_model, load_tokenizer
from uora.serving.generation import Generation
from uora.serving.sampling import Sampling
from uora.tuner import UoraConfig
from worker.engine.app import create_app
from worker.engine.runner import Runner, build_runner
from worker.engine.scheduler import EngineBusyError

TOKEN = "token-of-the-engine-tests"
HELLO = [{"role": "user", "content": "hello there"}]


@dataclass
class Engine:
    """A running engine, the database it reads and the adapters in it."""

    url: str
    runner: Runner
    sessions: sessionmaker[Session]
    adapters: dict[str, Artifact]

    def ask(self, model: str | None, **options: Any) -> tuple[str, list[dict[str, Any]]]:
        """The whole text of answer 0, and all lines."""
        with self.post(model, **options) as response:
            assert response.status_code == 200, response.read()
            lines = [json.loads(line) for line in response.iter_lines()]
        return "".join(line["text"] for line in lines if line["type"] == "delta" and line["index"] == 0), lines

    def refusal(self, model: str | None, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that is not answered."""
        with self.post(model, **options) as response:
            return response.status_code, json.loads(response.read())["error"]

    def post(self, model: str | None, token: str = TOKEN, **options: Any) -> Any:
        adapter = options.pop("adapter", None)
        if model is not None and adapter is None:
            adapter = {"id": model, "digest": self.adapters[model].manifest.digest}
        body = {"base_model": "tiny", "adapter": adapter, "max_tokens": 12, "temperature": 0}
        if "prompts" not in options:
            body["messages"] = HELLO
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.stream("POST", f"{self.url}/generate", json=body | options, headers=headers, timeout=60)


def make_adapter(base: LocalModel, *, seed: int, r: int, template: str | None = None) -> Artifact:
    model = get_peft_model(
        load_model(base, dtype=torch.float32, device="cpu"), UoraConfig(r=r, target_modules="all-linear")
    )
    randomise(model, seed=seed, scale=1.5)  # strong enough to change what a random model says
    provenance = Provenance(
        base_model="tiny",
        base_digest=base.digest,
        chat_template_sha256=template or template_sha256(load_tokenizer(base)),
        data_sha256="0" * 64,
    )
    return loads(store(model, provenance))


def add(sessions: sessionmaker[Session], name: str, artifact: Artifact, *, stored: bytes | None = None) -> None:
    with sessions.begin() as session:
        session.add(
            Adapter(
                id=name,
                project_id="proj_1",
                base_model="tiny",
                digest=artifact.manifest.digest,
                manifest=artifact.manifest.model_dump(mode="json"),
                artifact=stored or dumps(artifact),
            )
        )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    directory = make_tiny_llama(folder / "tiny", max_tokens=256)
    settings = Settings(
        home=folder,
        database_url=f"sqlite:///{folder / 'engine.db'}",
        cache_dir=folder / "cache",
        base_models={"tiny": f"path:{directory}"},
        engine_base_model="tiny",
        engine_token=TOKEN,  # type: ignore[arg-type]
        engine_max_rows=4,
        dtype="float32",
    )
    database = make_engine(settings.database_url)
    Base.metadata.create_all(database)
    sessions = make_sessions(database)
    with sessions.begin() as session:
        session.add(Project(id="proj_1", name="one", slug="one"))
    base = fetch("tiny", settings.base_models["tiny"], cache_dir=settings.cache_dir)
    adapters = {f"ft:tiny:one::{seed}": make_adapter(base, seed=seed, r=r) for seed, r in ((1, 8), (2, 8), (3, 5))}
    for name, artifact in adapters.items():
        add(sessions, name, artifact)
    built: list[Runner] = []

    def build(settings: Settings) -> Runner:
        runner = build_runner(settings)
        assert isinstance(runner, Runner)
        built.append(runner)
        return runner

    with serve(create_app(settings, build)) as url:
        yield Engine(url, built[0], sessions, adapters)


def test_health_and_readiness(engine: Engine) -> None:
    assert httpx.get(f"{engine.url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{engine.url}/readyz").json()
    assert ready["base_model"] == "tiny"
    assert len(ready["base_digest"]) == 64


def test_a_stream_starts_tells_and_finishes(engine: Engine) -> None:
    text, lines = engine.ask(None)
    assert lines[0]["type"] == "start"
    assert lines[0]["prompt_tokens"][0] > 5
    assert lines[0]["system_fingerprint"].startswith("fp_")
    assert lines[-1]["type"] == "finish"
    assert lines[-1]["finish_reason"] in ("stop", "length")
    assert 1 <= lines[-1]["completion_tokens"] <= 12
    assert text


def test_every_adapter_answers_differently_and_repeatably(engine: Engine) -> None:
    answers = {model: engine.ask(model)[0] for model in [None, *engine.adapters]}
    assert len(set(answers.values())) == len(answers)
    assert answers == {model: engine.ask(model)[0] for model in answers}


def test_concurrent_tenants_get_their_own_answers(engine: Engine) -> None:
    models = [None, *engine.adapters]
    alone = {model: engine.ask(model)[0] for model in models}
    wanted = models * 6  # more than the engine has rows
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda model: engine.ask(model)[0], wanted))
    assert found == [alone[model] for model in wanted]


def test_fingerprints_name_base_and_adapter(engine: Engine) -> None:
    seen = {engine.ask(model)[1][0]["system_fingerprint"] for model in [None, *engine.adapters] for _ in range(2)}
    assert len(seen) == 1 + len(engine.adapters)


def test_several_answers_and_their_seeds(engine: Engine) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 5}
    _, lines = engine.ask(None, **options)
    assert {line["index"] for line in lines if line["type"] == "finish"} == {0, 1, 2}

    assert len(set(texts(lines).values())) == 3
    assert texts(engine.ask(None, **options)[1]) == texts(lines)


def test_a_new_row_answers_at_once(engine: Engine) -> None:
    base = engine.runner.base
    artifact = make_adapter(base, seed=9, r=8)
    add(engine.sessions, "ft:tiny:one::new", artifact)
    engine.adapters["ft:tiny:one::new"] = artifact
    text, _ = engine.ask("ft:tiny:one::new")
    del engine.adapters["ft:tiny:one::new"]
    assert text not in {engine.ask(model)[0] for model in [None, *engine.adapters]}


def test_a_new_row_is_resident_before_it_is_asked_for_and_gone_once_it_is_deleted(engine: Engine) -> None:
    artifact = make_adapter(engine.runner.base, seed=13, r=8)
    digest = artifact.manifest.digest
    add(engine.sessions, "ft:tiny:one::early", artifact)
    wait_until(lambda: digest in engine.runner.bank)
    with engine.sessions.begin() as session:
        session.execute(delete(Adapter).where(Adapter.id == "ft:tiny:one::early"))
    wait_until(lambda: digest not in engine.runner.bank)


def test_a_row_that_changed_in_memory_answers_nobody(engine: Engine) -> None:
    model, artifact = next(iter(engine.adapters.items()))
    sound, row = engine.ask(model)[0], engine.runner.bank.row(artifact.manifest.digest)
    row.numbers["d"].zero_()
    residency = engine.runner.residency
    wait_until(lambda: artifact.manifest.digest in residency._stored)
    residency._audit(artifact.manifest.digest)
    assert row in engine.runner.scheduler._condemned
    assert engine.ask(model)[0] == sound


def test_a_promotion_is_seen_by_the_next_request(engine: Engine) -> None:
    """A request names the digest that its model's name stands for, which no residency need have seen before."""
    name = "ft:tiny:one::promoted"
    before, after = (make_adapter(engine.runner.base, seed=seed, r=8) for seed in (21, 22))
    old, new = ({"id": name, "digest": each.manifest.digest} for each in (before, after))
    add(engine.sessions, name, before)
    answer_before, _ = engine.ask(None, adapter=old)
    with engine.sessions.begin() as session:
        values = {"digest": after.manifest.digest, "artifact": dumps(after)}
        session.execute(update(Adapter).where(Adapter.id == name).values(**values))
    answer_after, _ = engine.ask(None, adapter=new)
    assert answer_after != answer_before
    data = base64.b64encode(dumps(after)).decode()
    assert engine.ask(None, adapter={"id": "sent", "data": data})[0] == answer_after
    wait_until(lambda: before.manifest.digest not in engine.runner.bank, seconds=2)
    status, error = engine.refusal(None, adapter=old)
    assert (status, error["code"]) == (500, "adapter_digest_mismatch")


def test_what_is_wrong_is_never_answered_by_the_base(engine: Engine) -> None:
    status, error = engine.refusal(None, adapter={"id": "ft:tiny:one::none", "digest": "0" * 64})
    assert (status, error["code"]) == (404, "adapter_not_found")
    known = next(iter(engine.adapters))
    status, error = engine.refusal(None, adapter={"id": known, "digest": "0" * 64})
    assert (status, error["code"]) == (500, "adapter_digest_mismatch")


def test_a_damaged_row_is_refused(engine: Engine) -> None:
    artifact = make_adapter(engine.runner.base, seed=11, r=8)
    damaged = bytearray(dumps(artifact))
    damaged[-3] ^= 1
    add(engine.sessions, "ft:tiny:one::damaged", artifact, stored=bytes(damaged))
    adapter = {"id": "ft:tiny:one::damaged", "digest": artifact.manifest.digest}
    assert engine.refusal(None, adapter=adapter)[1]["code"] == "adapter_digest_mismatch"


def test_another_chat_template_is_refused(engine: Engine) -> None:
    artifact = make_adapter(engine.runner.base, seed=12, r=8, template="f" * 64)
    add(engine.sessions, "ft:tiny:one::template", artifact)
    adapter = {"id": "ft:tiny:one::template", "digest": artifact.manifest.digest}
    assert engine.refusal(None, adapter=adapter)[1]["code"] == "chat_template_mismatch"


def test_token_base_model_and_lengths(engine: Engine) -> None:
    assert engine.refusal(None, token="wrong")[0] == 401
    assert engine.refusal(None, base_model="other") == (
        404,
        {"code": "model_not_found", "message": "This engine serves tiny, not other.", "param": None},
    )
    long = [{"role": "user", "content": "x " * 400}]
    status, error = engine.refusal(None, messages=long)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "256" in error["message"]
    assert engine.refusal(None, max_tokens=10_000)[1]["code"] == "context_length_exceeded"
    assert engine.refusal(None, surprise=1)[0] == 400


def test_a_client_that_leaves_frees_its_row(engine: Engine) -> None:
    with engine.post(None, max_tokens=200, temperature=1.0, seed=3, stop=[]) as response:
        next(response.iter_lines())
    batcher = engine.runner.scheduler._batcher
    wait_until(lambda: not batcher.running)
    assert engine.ask(None)[0]


def test_lines_have_no_nulls_and_say_what_answers(engine: Engine) -> None:
    model, artifact = next(iter(engine.adapters.items()))
    for name in (None, model):
        with engine.post(name) as response:
            text = response.read().decode()
        assert "null" not in text
        start = json.loads(text.splitlines()[0])
        frames = json.dumps(artifact.manifest.fingerprint, sort_keys=True).encode()
        adapter = {"frames": hashlib.sha256(frames).hexdigest(), "adapter": artifact.manifest.digest}
        assert start["provenance"] == {"base": engine.runner.base.digest} | (adapter if name else {})


class TestRawPrompts:
    """What ``/v1/completions`` asks for."""

    def test_they_are_tokenized_as_in_training(self, engine: Engine) -> None:
        tokenizer = engine.runner.tokenizer
        for prompt in ("the  \n", "<|im_start|>user\nhi<|im_end|>", "the"):
            ids = prompt_ids(tokenizer, prompt)
            assert ids == encode_completion(CompletionRow(prompt, "x", 1), tokenizer).input_ids[: len(ids)]
            (text, lines), by_ids = engine.ask(None, prompts=[prompt]), engine.ask(None, prompts=[ids])[0]
            assert lines[0]["prompt_tokens"] == [len(ids)]
            assert text == by_ids
        assert engine.ask(None)[0] != engine.ask(None, prompts=[HELLO[0]["content"]])[0]  # no template is written

    def test_each_answers_as_if_it_were_alone(self, engine: Engine) -> None:
        options: dict[str, Any] = {"n": 2, "temperature": 1.5, "seed": 5}
        together = texts(engine.ask(None, prompts=["one", "the other"], **options)[1])
        alone = [texts(engine.ask(None, prompts=[prompt], **options)[1]) for prompt in ("one", "the other")]
        assert together == dict(enumerate([*alone[0].values(), *alone[1].values()]))
        assert len(set(together.values())) == 4

    def test_an_echo_comes_first(self, engine: Engine) -> None:
        plain = engine.ask(None, prompts=["a <|im_end|> ü"])[0]
        assert engine.ask(None, prompts=["a <|im_end|> ü"], echo=True)[0] == "a <|im_end|> ü" + plain
        ids = prompt_ids(engine.runner.tokenizer, "a <|im_end|> ü")
        assert engine.ask(None, prompts=[ids], echo=True)[0] == "a <|im_end|> ü" + plain

    def test_adapters_answer_them_too(self, engine: Engine) -> None:
        found = {engine.ask(model, prompts=["once"])[0] for model in [None, *engine.adapters]}
        assert len(found) == 1 + len(engine.adapters)

    def test_a_model_of_prompts_and_completions_is_not_asked_in_a_template(self, engine: Engine) -> None:
        artifact = make_adapter(engine.runner.base, seed=21, r=8)
        manifest = artifact.manifest.model_copy(update={"chat_template_sha256": None, "task": "completion"})
        artifact = loads(dumps(replace(artifact, manifest=manifest)))
        add(engine.sessions, "ft:tiny:one::raw", artifact)
        adapter = {"id": "ft:tiny:one::raw", "digest": artifact.manifest.digest}
        for _ in range(2):  # before and after it is resident
            status, error = engine.refusal(None, adapter=adapter)
            assert (status, error["code"], error["param"]) == (400, "chat_template_mismatch", "model")
            assert engine.ask(None, adapter=adapter, prompts=["once"])[0] != engine.ask(None, prompts=["once"])[0]

    @pytest.mark.parametrize(
        ("options", "code", "param"),
        [
            ({"prompts": ["a", "b " * 300]}, "context_length_exceeded", "prompt[1]"),
            ({"prompts": ["a"], "max_tokens": 256}, "context_length_exceeded", "prompt"),
            ({"prompts": [[5, 100_000]]}, "invalid_token", "prompt"),
            ({"prompts": ["a", [-1]]}, "invalid_token", "prompt[1]"),
            ({"prompts": ["a", ""]}, "empty_prompt", "prompt[1]"),
            ({"prompts": ["a"], "logit_bias": {"100000": 1}}, "invalid_token", "logit_bias"),
            ({"response_format": {"json_schema": {"type": "no such"}}}, "invalid_json_schema", "response_format"),
            ({"prompts": ["a"], "messages": HELLO}, "invalid_request", None),
            ({"prompts": []}, "invalid_request", None),
        ],
        ids=str,
    )
    def test_what_cannot_be_answered(
        self, engine: Engine, options: dict[str, Any], code: str, param: str | None
    ) -> None:
        status, error = engine.refusal(None, **options)
        assert (status, error["code"], error["param"]) == (400, code, param)


def test_an_answer_can_be_held_to_json(engine: Engine) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "ü😀"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    text, _ = engine.ask(None, response_format={"json_schema": schema}, max_tokens=60)
    assert json.loads(text)["a"] in ("x", "ü😀")
    assert engine.ask(None, response_format={}, max_tokens=60)[0].lstrip().startswith("{")


def test_log_probabilities_are_of_the_text(engine: Engine) -> None:
    text, lines = engine.ask(None, top_logprobs=2, temperature=0)
    tokens = [token for line in lines for token in line.get("logprobs", ())]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace").startswith(text[:5])
    assert all(token["top"][0]["logprob"] == token["logprob"] <= 0.0 for token in tokens)
    assert all(len(token["top"]) == 2 for token in tokens)
    assert engine.ask(None, temperature=0)[0] == text


class TestInlineAdapters:
    """Adapters that come with the request."""

    def test_it_answers_as_a_stored_one_does(self, engine: Engine) -> None:
        artifact = make_adapter(engine.runner.base, seed=31, r=8)
        adapter = inline(artifact)
        text, lines = engine.ask(None, adapter=adapter)
        assert lines[0]["provenance"]["adapter"] == artifact.manifest.digest
        assert engine.ask(None, adapter=adapter)[0] == text
        assert text not in {engine.ask(model)[0] for model in [None, *engine.adapters]}
        add(engine.sessions, "ft:tiny:one::stored", artifact)
        stored = {"id": "ft:tiny:one::stored", "digest": artifact.manifest.digest}
        assert engine.ask(None, adapter=stored) == (text, lines)

    def test_what_is_wrong_is_the_clients(self, engine: Engine) -> None:
        other_base = make_adapter(engine.runner.base, seed=32, r=8)
        other_base = with_manifest(other_base, base_digest="f" * 64)
        other_template = with_manifest(other_base, base_digest=engine.runner.base.digest, chat_template_sha256="f" * 64)
        other_frames = with_manifest(other_base, base_digest=engine.runner.base.digest)
        fingerprint = {name: [0.5] * len(probes) for name, probes in other_frames.manifest.fingerprint.items()}
        other_frames = with_manifest(other_frames, fingerprint=fingerprint)
        changed = bytearray(dumps(other_base))
        changed[-1] ^= 1
        expected = {
            "base_model_mismatch": inline(other_base),
            "chat_template_mismatch": inline(other_template),
            "frame_fingerprint_mismatch": inline(other_frames),
            "adapter_format": inline(other_base) | {"data": base64.b64encode(b"nothing").decode()},
            "adapter_digest_mismatch": inline(other_base) | {"data": base64.b64encode(changed).decode()},
            "model_not_supported": inline(with_manifest(other_base, task="regression")),
        }
        for code, adapter in expected.items():
            status, error = engine.refusal(None, adapter=adapter)
            assert (status, error["code"], error["param"]) == (400, code, "adapter.data")


def test_a_request_says_whose_it_is_and_until_when(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Generation] = []
    submit = engine.runner.scheduler.submit

    def watch(generations: Sequence[Generation], artifact: Artifact | None) -> None:
        taken.extend(generations)
        submit(generations, artifact)

    monkeypatch.setattr(engine.runner.scheduler, "submit", watch)
    before = time.monotonic()
    sampling = {"presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"9": -5}, "top_logprobs": 2}
    engine.ask(None, project="proj_7", deadline_seconds=30, seed=4, stop=["zzz"], **sampling)
    engine.ask(None)
    first, second = taken
    assert first.project == "proj_7"
    assert first.deadline is not None
    assert before + 30 <= first.deadline <= time.monotonic() + 30
    assert second.deadline is None
    assert first.sampling == Sampling(
        temperature=0.0,
        seed=4,
        stop=("zzz",),
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={9: -5.0},
        top_logprobs=2,
    )


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        (EngineBusyError(retry_after=2.5), (503, "engine_busy", 2.5)),
        (EngineBusyError(own_share=True, retry_after=4.0), (429, "rate_limit_exceeded", 4.0)),
    ],
)
def test_a_full_queue(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, busy: EngineBusyError, expected: tuple[int, str, float]
) -> None:
    def refuse(*_: object) -> None:
        raise busy

    monkeypatch.setattr(engine.runner.scheduler, "submit", refuse)
    status, error = engine.refusal(None)
    assert (status, error["code"], error["retry_after"]) == expected


def texts(lines: list[dict[str, Any]]) -> dict[int, str]:
    """Index -> the whole text of that answer."""
    found = {line["index"]: "" for line in lines if line["type"] == "finish"}
    for line in lines:
        if line["type"] == "delta":
            found[line["index"]] += line["text"]
    return dict(sorted(found.items()))


def inline(artifact: Artifact) -> dict[str, Any]:
    """An adapter as the api passes it on."""
    data = base64.b64encode(dumps(artifact)).decode()
    return {"id": "(sent with the request)", "data": data}


def with_manifest(artifact: Artifact, **fields: Any) -> Artifact:
    """The same numbers under another manifest."""
    return loads(dumps(replace(artifact, manifest=artifact.manifest.model_copy(update=fields))))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("plain")
    directory = make_tiny_causal(folder / "tiny", "gpt2", chat_template=None)
    settings = Settings(
        home=folder,
        database_url=f"sqlite:///{folder / 'engine.db'}",
        cache_dir=folder / "cache",
        base_models={"tiny": f"path:{directory}"},
        engine_base_model="tiny",
        engine_token=TOKEN,  # type: ignore[arg-type]
        dtype="float32",
    )
    database = make_engine(settings.database_url)
    Base.metadata.create_all(database)
    runner = build_runner(settings)
    assert isinstance(runner, Runner)
    with serve(create_app(settings, lambda _: runner)) as url:
        yield Engine(url, runner, make_sessions(database), {})


class TestWithoutChatTemplate:
    """A base model that was trained on text alone continues texts; it has no conversations."""

    def test_prompts_are_continued(self, plain: Engine) -> None:
        text, lines = plain.ask(None, prompts=["once"])
        assert text
        assert lines[-1]["type"] == "finish"

    def test_conversations_are_refused(self, plain: Engine) -> None:
        status, error = plain.refusal(None)
        assert (status, error["code"], error["param"]) == (400, "no_chat_template", "messages")
        assert "/v1/completions" in error["message"]

    def test_adapters_of_conversations_are_refused(self, plain: Engine) -> None:
        base = plain.runner.base
        adapter = inline(make_adapter(base, seed=1, r=4, template="f" * 64))
        status, error = plain.refusal(None, adapter=adapter, prompts=["once"])
        assert (status, error["code"]) == (400, "no_chat_template")
