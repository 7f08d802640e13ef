"""The engine over HTTP: adapters from a real database, verified, mixed and streamed; what is wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from peft import get_peft_model
from sqlalchemy.orm import Session, sessionmaker

from api.database import Base, make_engine, make_sessions
from api.models.models import Adapter
from api.projects.models import Project
from api.settings import Settings
from tests.api.support import serve, wait_until
from tests.tiny import make_tiny_llama
from tests.uora.toys import randomise, store
from uora.artifact import Artifact, Provenance, dumps, loads
from uora.data.templates import template_sha256
from uora.models import LocalModel, fetch, load_model, load_tokenizer
from uora.tuner import UoraConfig
from worker.engine.app import create_app
from worker.engine.runner import Runner, build_runner

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
        body = {"base_model": "tiny", "adapter": adapter, "messages": HELLO, "max_tokens": 12, "temperature": 0}
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
    assert lines[0]["prompt_tokens"] > 5
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

    def texts(lines: list[dict[str, Any]]) -> list[str]:
        return [
            "".join(line["text"] for line in lines if line["type"] == "delta" and line["index"] == index)
            for index in range(3)
        ]

    assert len(set(texts(lines))) == 3
    assert texts(engine.ask(None, **options)[1]) == texts(lines)


def test_a_new_row_answers_at_once(engine: Engine) -> None:
    base = engine.runner.base
    artifact = make_adapter(base, seed=9, r=8)
    add(engine.sessions, "ft:tiny:one::new", artifact)
    engine.adapters["ft:tiny:one::new"] = artifact
    text, _ = engine.ask("ft:tiny:one::new")
    del engine.adapters["ft:tiny:one::new"]
    assert text not in {engine.ask(model)[0] for model in [None, *engine.adapters]}


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
