"""The engine's classes and numbers over HTTP: many adapters in one pass, each item as it would be answered alone."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, select
from sqlalchemy.orm import Session, sessionmaker

from api.database import Base, make_engine, make_sessions
from api.main import create_app as create_api
from api.models.models import Adapter
from api.projects.models import Project
from api.projects.service import create_api_key
from api.settings import Settings
from tests.api.support import RecordingQueue, register_engine, serve, wait_until
from tests.tiny import make_tiny_bert, make_tiny_llama, make_tiny_vit
from tests.uora.task_cases import CASES, Case, run, spec_of
from tests.worker.engine.test_app import HELLO, TOKEN, add
from uora.artifact import Artifact
from uora.data import ImageRow, TextRow
from uora.models import fetch
from uora.serving.classification import Classifier
from uora.spec import MethodName
from worker.engine.app import create_app
from worker.engine.classifying import Classifying
from worker.engine.errors import EngineError
from worker.engine.runner import Runner, Served, build_runner


@dataclass
class Engine:
    """A running engine and the adapters in its database."""

    url: str
    settings: Settings
    sessions: sessionmaker[Session]
    served: Served
    models: dict[str, tuple[Case, Artifact]]

    def ask(self, name: str, items: list[dict[str, Any]], **options: Any) -> httpx.Response:
        digest = self.models[name][1].manifest.digest
        body = {"base_model": "tiny", "adapter": {"id": name, "digest": digest}, "items": items} | options
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.post(f"{self.url}/classify", json=body, headers=headers, timeout=60, trust_env=False)

    def answers(self, name: str, items: list[dict[str, Any]]) -> list[Any]:
        answer = self.ask(name, items)
        assert answer.status_code == 200, answer.text
        found: list[Any] = answer.json()["probabilities"] + answer.json()["values"]
        assert len(found) == len(items)
        return found


@contextmanager
def running(
    folder: Path, make_base: Callable[[Path], Path], wanted: dict[str, tuple[str, MethodName]], **options: Any
) -> Iterator[Engine]:
    settings = Settings(
        _env_file=None,
        home=folder,
        database_url=f"sqlite:///{folder / 'engine.db'}",
        cache_dir=folder / "cache",
        base_models={"tiny": f"path:{make_base(folder / 'tiny')}"},
        engine_token=TOKEN,  # type: ignore[arg-type]
        dtype="float32",
        **options,
    )
    database = make_engine(settings.database_url)
    Base.metadata.create_all(database)
    sessions = make_sessions(database)
    with sessions.begin() as session:
        session.add(Project(id="proj_1", name="one", slug="one"))
    base = fetch("tiny", settings.base_models["tiny"], cache_dir=settings.cache_dir)
    models = {}
    for name, (case_name, method) in wanted.items():
        case = CASES[case_name]
        models[name] = case, run(spec_of(case.task, method, n_epochs=3), base, case).artifact
        add(sessions, name, models[name][1])
    built: list[Served] = []

    def build(settings: Settings) -> Served:
        built.append(build_runner(settings))
        return built[0]

    with serve(create_app(settings, build)) as url:
        yield Engine(url, settings, sessions, built[0], models)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    wanted: dict[str, tuple[str, MethodName]] = {
        "kinds": ("classification", "uora"),
        "pairs": ("pairs", "lora"),
        "price": ("regression", "uora"),
    }
    with running(tmp_path_factory.mktemp("encoder"), make_tiny_bert, wanted) as engine:
        yield engine


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    wanted: dict[str, tuple[str, MethodName]] = {"kinds": ("decoder", "uora"), "talk": ("chat", "uora")}
    with running(tmp_path_factory.mktemp("decoder"), make_tiny_llama, wanted) as engine:
        yield engine


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running(
        tmp_path_factory.mktemp("images"), make_tiny_vit, {"look": ("image-classification", "uora")}
    ) as engine:
        yield engine


def items_of(case: Case, count: int = 7) -> list[dict[str, Any]]:
    found = []
    for row in case.rows[:count]:
        if isinstance(row, ImageRow):
            found.append({"image": "data:image/png;base64," + base64.b64encode(row.image).decode()})
        else:
            assert isinstance(row, TextRow)
            found.append({"text": row.text, "text_pair": row.text_pair})
    return found


def close(found: Any, expected: Any) -> bool:
    return bool(found == pytest.approx(expected, rel=1e-6, abs=1e-6))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Adapters of the rows of every pass."""
    seen: list[list[str]] = []
    answer = Classifier.answer

    def remember(self: Classifier, encoded: Any, adapters: Any) -> Any:
        seen.append([row.digest for row in adapters])
        return answer(self, encoded, adapters)

    monkeypatch.setattr(Classifier, "answer", remember)
    return seen


@contextmanager
def all_waiting(engine: Engine, items: int) -> Iterator[None]:
    """What is asked within the block is answered at its end, together: the device is busy, and one item occupies the
    thread."""
    with ExitStack() as stack:
        stack.enter_context(engine.served.turn)
        yield
        wait_until(lambda: engine.served.classifying.waiting + engine.served.classifying.running >= items)


def test_many_adapters_in_one_pass_answer_as_alone(encoder: Engine, passes: list[list[str]]) -> None:
    wanted = [(name, item) for name, (case, _) in encoder.models.items() for item in items_of(case)] * 2
    alone = [encoder.answers(name, [item])[0] for name, item in wanted]
    passes.clear()
    with ThreadPoolExecutor(len(wanted)) as pool:
        with all_waiting(encoder, len(wanted)):
            asked = [pool.submit(encoder.answers, name, [item]) for name, item in wanted]
        together = [each.result()[0] for each in asked]
    assert len(passes) < len(wanted) / 2
    assert any(len(set(digests)) == len(encoder.models) for digests in passes)
    assert all(map(close, together, alone))
    for name, (case, _) in encoder.models.items():
        assert all(
            map(
                close,
                encoder.answers(name, items_of(case)),
                [a for (n, _), a in zip(wanted, alone, strict=True) if n == name],
            )
        )


def test_classes_and_numbers_come_with_their_labels(encoder: Engine) -> None:
    for name, (case, artifact) in encoder.models.items():
        answer = encoder.ask(name, items_of(case, 2)).json()
        assert answer["labels"] == list(artifact.manifest.labels)
        assert answer["provenance"]["adapter"] == artifact.manifest.digest
        if case.task == "regression":
            assert answer["probabilities"] == []
            assert all(100 < value < 400 for value in answer["values"])
        else:
            assert all(sum(row) == pytest.approx(1) for row in answer["probabilities"])
    assert len({encoder.ask(n, [{"text": "fig"}]).json()["system_fingerprint"] for n in encoder.models}) == 3


class TestResidency:
    """The bank of classifiers follows the database and is audited by the code that does it for text."""

    def test_new_ones_come_and_deleted_ones_go(self, encoder: Engine) -> None:
        bank, artifact = encoder.served.classifying.half.bank, encoder.models["kinds"][1]
        digests = {each.manifest.digest for _, each in encoder.models.values()}
        wait_until(lambda: bank.digests() == digests)  # whether anybody asked for them or not
        with encoder.sessions.begin() as session:
            session.execute(delete(Adapter).where(Adapter.id == "kinds"))
        wait_until(lambda: artifact.manifest.digest not in bank, seconds=5)
        answer = encoder.ask("kinds", [{"text": "fig"}])
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
        add(encoder.sessions, "kinds", artifact)
        wait_until(lambda: bank.digests() == digests, seconds=5)

    def test_text_and_classes_have_each_their_own(self, decoder: Engine) -> None:
        assert isinstance(decoder.served, Runner)
        banks = {"kinds": decoder.served.classifying.half.bank, "talk": decoder.served.bank}
        for name, bank in banks.items():
            digest = decoder.models[name][1].manifest.digest
            wait_until(lambda bank=bank, digest=digest: bank.digests() == {digest})

    def test_a_head_that_changed_in_memory_answers_nobody(self, encoder: Engine) -> None:
        classifying, digest = encoder.served.classifying, encoder.models["kinds"][1].manifest.digest
        sound = encoder.answers("kinds", [{"text": "fig"}])
        residency = classifying._residency
        assert residency is not None
        wait_until(lambda: digest in residency._stored)
        with ThreadPoolExecutor(2) as pool:
            with all_waiting(encoder, 2):
                asked = [pool.submit(encoder.ask, name, [{"text": "fig"}]) for name in ("kinds", "pairs")]
                wait_until(lambda: classifying.waiting + classifying.running == 2)
                next(iter(classifying.half.bank.row(digest).head.values())).zero_()
                residency._audit(digest)
            broken, other = (each.result() for each in asked)
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "adapter_corrupted")
        assert other.status_code == 200
        assert close(encoder.answers("kinds", [{"text": "fig"}])[0], sound[0])

    def test_more_adapters_at_once_than_there_is_room_for(self, tmp_path: Path) -> None:
        wanted: dict[str, tuple[str, MethodName]] = {
            "kinds": ("classification", "uora"),
            "price": ("regression", "uora"),
        }
        with running(tmp_path, make_tiny_bert, wanted, engine_adapter_memory=0) as engine:
            alone = {name: engine.answers(name, [{"text": "fig"}]) for name in wanted}
            names = [*wanted] * 3
            with ThreadPoolExecutor(len(names)) as pool:
                with all_waiting(engine, len(names)):
                    asked = [pool.submit(engine.answers, name, [{"text": "fig"}]) for name in names]
                found = [each.result() for each in asked]
            assert all(close(each[0], alone[name][0]) for name, each in zip(names, found, strict=True))
            assert engine.served.classifying.resident == 1


def test_too_long_texts_are_all_named(encoder: Engine) -> None:
    items = [{"text": "fig"}, {"text": "word " * 20}, {"text": "fig"}, {"text": "a " * 70}]
    answer = encoder.ask("kinds", items)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
    assert "takes 64 tokens" in error["message"]
    assert "input[1] has 82, input[3] has 72" in error["message"]


def test_items_of_another_kind(encoder: Engine, images: Engine) -> None:
    image = items_of(images.models["look"][0], 1)[0]
    for answer in (encoder.ask("kinds", [{"text": "fig"}, image]), images.ask("look", [image, {"text": "fig"}])):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")


def test_images_and_broken_ones(images: Engine) -> None:
    items = items_of(images.models["look"][0])
    assert all(map(close, images.answers("look", items), [images.answers("look", [item])[0] for item in items]))
    cut = {"image": items[0]["image"][:60]}
    error = images.ask("look", [items[0], cut]).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_image", "input[1]")


def test_a_text_model_classifies_without_a_second_copy(decoder: Engine) -> None:
    assert isinstance(decoder.served, Runner)
    items = items_of(decoder.models["kinds"][0])
    assert all(map(close, decoder.answers("kinds", items), [decoder.answers("kinds", [item])[0] for item in items]))
    text = {p.data_ptr() for p in decoder.served.scheduler._batcher._model.parameters()}
    classifier = decoder.served.classifying.half.classifier._model
    own = [name for name, p in classifier.named_parameters() if p.data_ptr() not in text]
    assert own == []
    body = {"base_model": "tiny", "messages": HELLO, "max_tokens": 2}
    answer = httpx.post(f"{decoder.url}/generate", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200


def test_a_model_of_another_task_is_refused(decoder: Engine, encoder: Engine) -> None:
    error = decoder.ask("talk", [{"text": "fig"}]).json()["error"]
    assert (error["code"], error["param"]) == ("model_not_supported", "model")
    body = {"base_model": "tiny", "messages": HELLO}
    answer = httpx.post(f"{encoder.url}/generate", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_supported")


def test_a_failing_item_fails_its_own_request_alone(encoder: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoder.answers("kinds", [{"text": "fig"}])
    answer = Classifier.answer

    def fail(self: Classifier, encoded: Any, adapters: Any) -> Any:
        if any(len(each["input_ids"]) == 9 for each in encoded):
            raise MemoryError
        return answer(self, encoded, adapters)

    monkeypatch.setattr(Classifier, "answer", fail)
    texts = ["fig"] * 5 + ["aaaaaaa"] + ["fig"] * 5
    with ThreadPoolExecutor(len(texts)) as pool:
        with all_waiting(encoder, len(texts)):
            asked = [pool.submit(encoder.ask, "kinds", [{"text": text}]) for text in texts]
        found = [each.result() for each in asked]
    assert [answer.status_code for answer in found] == [200] * 5 + [500] + [200] * 5
    assert all(close(found[i].json()["probabilities"][0], expected[0]) for i in (0, -1))


def test_a_client_that_leaves_drops_its_items(encoder: Engine, passes: list[list[str]]) -> None:
    """From the client's connection to the api down to the engine's queue, and nobody else notices."""
    digests = {name: artifact.manifest.digest for name, (_, artifact) in encoder.models.items()}
    expected = {name: encoder.answers(name, [{"text": "fig"}]) for name in ("kinds", "pairs")}
    passes.clear()
    queue = encoder.served.classifying._waiting
    with service(encoder) as (url, headers), ThreadPoolExecutor(2) as pool:

        def ask(name: str) -> httpx.Response:
            body = {"model": name, "input": "fig"}
            return httpx.post(f"{url}/v1/classify", json=body, headers=headers, timeout=60, trust_env=False)

        with encoder.served.turn:
            first = pool.submit(ask, "kinds")  # has the thread, which waits for the device
            wait_until(lambda: encoder.served.classifying.running == 1)
            leaving = begin(f"{url}/v1/classify", {"model": "price", "input": ["fig", "saw"]}, headers)
            wait_until(lambda: len(queue) == 2)
            staying = pool.submit(ask, "pairs")
            wait_until(lambda: len(queue) == 3)
            leaving.close()
            wait_until(lambda: [item.request.done.cancelled() for item in queue] == [True, True, False])
        answers = {"kinds": first.result(), "pairs": staying.result()}
    for name, answer in answers.items():
        assert answer.status_code == 200, answer.text
        assert close(answer.json()["data"][0]["probs"], expected[name][0])
    assert passes == [[digests["kinds"]], [digests["pairs"]]]


@contextmanager
def service(engine: Engine) -> Iterator[tuple[str, dict[str, str]]]:
    """An api before the engine: its URL, and the headers of the project that has the models."""
    with engine.sessions.begin() as session:
        key = create_api_key(session, session.scalars(select(Project)).one(), name="tests")
    register_engine(engine.sessions, engine.url)
    with serve(create_api(engine.settings, queue=RecordingQueue())) as url:
        yield url, {"Authorization": f"Bearer {key}"}


def begin(url: str, body: dict[str, Any], headers: dict[str, str]) -> socket.socket:
    """Send a request and read nothing."""
    request = httpx.Request("POST", url, json=body, headers=headers)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection = socket.create_connection((request.url.host, request.url.port))
    connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection


def test_too_many_waiting_items_are_refused() -> None:
    unused: Any = None
    classifying = Classifying(
        unused, base_model="tiny", store=unused, turn=threading.Lock(), max_waiting=3, max_tokens=64
    )
    classifying.submit([{"input_ids": [1]}] * 2, unused)  # not started: everything waits
    with pytest.raises(EngineError) as refused:
        classifying.submit([{"input_ids": [1]}] * 2, unused)
    assert (refused.value.status, refused.value.code) == (503, "engine_busy")
