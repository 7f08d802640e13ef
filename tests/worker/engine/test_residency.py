"""The bank follows the database, and what it holds is audited against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from sqlalchemy import delete, event, text, update
from structlog.testing import capture_logs

from api.completions.engine import WRITING_TASKS
from api.models.models import Adapter
from tests.tiny import make_tiny_llama, make_tiny_tokenizer
from tests.uora.serving.test_generation import Collected
from tests.worker.engine.test_app import make_adapter
from tests.worker.support import BASE_MODEL, Service, wait_until
from uora.artifact import Artifact, dumps, loads
from uora.data.templates import template_sha256
from uora.errors import ArtifactError, DigestError
from uora.models import LocalModel, fetch, load_model, load_tokenizer
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Generation
from uora.serving.rows import Row
from uora.serving.sampling import Sampling
from uora.spec import Task
from worker.engine.adapters import AdapterStore
from worker.engine.checking import check_writer
from worker.engine.residency import Residency
from worker.engine.scheduler import Scheduler

Make = Callable[..., Residency]
on_postgresql = pytest.mark.parametrize("any_service", ["postgresql"], indirect=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("residency")
    return fetch("tiny", f"path:{make_tiny_llama(folder / 'tiny', max_tokens=256)}", cache_dir=folder)


@pytest.fixture(scope="module")
def adapters(base: LocalModel) -> list[Artifact]:
    return [make_adapter(base, seed=seed, r=4) for seed in (1, 2, 3)]


@pytest.fixture
def bank(base: LocalModel) -> AdapterBank:
    return new_bank(base)


@pytest.fixture
def make(any_service: Service, base: LocalModel, bank: AdapterBank) -> Iterator[Make]:
    """Makes a residency of ``bank`` and the service's database, which runs if it is started; all are stopped."""
    with ExitStack() as stack:

        def make(*, bank: AdapterBank = bank, start: bool = False, **options: object) -> Residency:
            made = Residency(
                bank,
                AdapterStore(any_service.sessions),
                base_model=BASE_MODEL,
                tasks=WRITING_TASKS,
                check=partial(check_writer, bank=bank, template_sha256=template_sha256(load_tokenizer(base))),
                **({"interval": 0.1} | options),  # type: ignore[arg-type]
            )
            if start:
                made.start()
                stack.callback(made.stop)
            return made

        yield make


def test_new_ones_come_and_deleted_ones_go(
    any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    first, second, _ = adapters
    add(any_service, "first", first)
    make(start=True)
    wait_until(lambda: bank.digests() == {digest(first)}, what="the first adapter")
    add(any_service, "second", second)
    wait_until(lambda: bank.digests() == {digest(first), digest(second)}, what="the second adapter", seconds=1)
    remove(any_service, "first")
    wait_until(lambda: bank.digests() == {digest(second)}, what="the first one's end", seconds=1)


def test_a_running_answer_outlives_its_adapter(
    any_service: Service, make: Make, base: LocalModel, adapters: list[Artifact]
) -> None:
    served = Served.of(base)
    add(any_service, "first", adapters[0])
    residency = make(bank=served.bank)
    residency.look()
    _, alone = served.run(adapters[0], steps=40)
    running, collected = served.begin(adapters[0], steps=40)
    served.batcher.step()
    remove(any_service, "first")
    residency.look()
    assert len(served.bank) == 0
    while running in served.batcher.generations:
        served.batcher.step()
    assert (collected.text, collected.error) == (alone.text, None)
    assert collected.text != served.run(None, steps=40)[1].text


def test_a_request_that_found_its_adapter_is_answered_though_it_goes(
    any_service: Service, make: Make, base: LocalModel, adapters: list[Artifact]
) -> None:
    """Also one that came with its request, which the database never had."""
    served = Served.of(base)
    residency = make(bank=served.bank)
    row = served.bank.put(adapters[0])
    residency.look()
    assert len(served.bank) == 0
    held, collected = generation(adapters[0])
    held.row = row
    served.batcher.join([held])
    assert collected.error is None
    assert served.batcher.generations == [held]


def test_more_adapters_at_once_than_there_is_room_for(base: LocalModel, adapters: list[Artifact]) -> None:
    served = Served.of(base, budget=1)
    scheduler = Scheduler(served.batcher, served.bank)
    alone = []
    for item in adapters:
        served.bank.put(item)
        alone.append(served.run(item)[1].text)
    answers = [generation(item) for item in adapters]
    for item, (made, _) in zip(adapters, answers, strict=True):
        scheduler.submit([made], item)
    scheduler.start()
    wait_until(lambda: all(collected.reason or collected.error for _, collected in answers), what="all ends")
    scheduler.stop()
    assert [collected.text for _, collected in answers] == alone
    assert len(served.bank) == 1


def test_what_enters_while_the_database_is_read_stays(
    any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    residency = make()
    digests = AdapterStore.digests

    def slowly(self: AdapterStore, *wanted: Any) -> dict[str, int]:
        found = digests(self, *wanted)
        bank.put(adapters[0])
        return found

    monkeypatch.setattr(AdapterStore, "digests", slowly)
    residency.look()
    assert digest(adapters[0]) in bank


def test_replaced_content(any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]) -> None:
    """As when another checkpoint is promoted: what the name stood for before is gone at the next look."""
    first, second, third = adapters
    add(any_service, "first", first)
    add(any_service, "second", second)
    residency = make()
    residency.look()
    store(any_service, "first", digest=digest(third), artifact=dumps(third))
    residency.look()
    assert bank.digests() == {digest(second), digest(third)}
    store(any_service, "first", digest=digest(second), artifact=dumps(second))
    residency.look()
    assert bank.digests() == {digest(second)}


def test_nothing_is_read_while_nothing_changes(
    any_service: Service, make: Make, adapters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(any_service, "first", adapters[0])
    residency = make()
    residency.look()
    monkeypatch.delattr(AdapterStore, "digests")
    monkeypatch.delattr(AdapterStore, "read")
    residency.look()
    add(any_service, "second", adapters[1])
    with pytest.raises(AttributeError):
        residency.look()


def test_only_adapters_of_the_base_model(
    any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    add(any_service, "first", adapters[0], base_model="another")
    add(any_service, "second", adapters[1])
    make().look()
    assert bank.digests() == {digest(adapters[1])}


def test_adapters_of_other_tasks_are_not_read(
    any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    first, second, third = adapters
    add(any_service, "chat", first)
    add(any_service, "completion", for_task(second, "completion"))
    add(any_service, "classification", for_task(third, "classification"))
    residency = make()
    with capture_logs() as logs:
        residency.look()
    assert bank.digests() == {digest(first), digest(for_task(second, "completion"))}
    assert logs == []


@on_postgresql
def test_a_commit_that_began_before_another_is_not_missed(
    any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    first, second, _ = adapters
    residency = make()
    with any_service.sessions.begin() as slow:
        slow.add(row(any_service, "first", first))
        slow.flush()
        add(any_service, "second", second)
        residency.look()
        assert bank.digests() == {digest(second)}
    residency.look()
    assert bank.digests() == {digest(first), digest(second)}


@on_postgresql
def test_ten_thousand_rows_cost_a_look_nothing(any_service: Service) -> None:
    store = AdapterStore(any_service.sessions)
    add_many(any_service, 2)
    few = plan(any_service, lambda: store.version(BASE_MODEL))
    add_many(any_service, 10_000)
    many = plan(any_service, lambda: store.version(BASE_MODEL))
    assert "adapter_versions" in str(few)
    assert few == many
    compared = plan(any_service, lambda: store.digests(BASE_MODEL, WRITING_TASKS))
    assert "'Index Only Scan'" in str(compared)
    assert "'ix_adapters_base_model_task_seq_digest'" in str(compared)


def test_what_is_refused_is_logged_once_and_holds_nobody_up(
    any_service: Service, make: Make, base: LocalModel, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    first, second, third = adapters
    damaged = bytearray(dumps(second))
    damaged[-3] ^= 1
    template = make_adapter(base, seed=4, r=4, template="f" * 64)
    add(any_service, "first", first)
    add(any_service, "damaged", second, stored=bytes(damaged))
    add(any_service, "swapped", third, stored=dumps(first))
    add(any_service, "template", template)
    residency = make()
    with capture_logs() as logs:
        for _ in range(3):
            residency._compare_at = 0.0
            residency.look()
    refused = [entry["digest"] for entry in logs if entry["event"] == "adapter_refused"]
    assert sorted(refused) == sorted(digest(item) for item in (second, third, template))
    assert bank.digests() == {digest(first)}


def test_preloading_drives_nobody_out(
    any_service: Service, make: Make, base: LocalModel, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    first, second, third = adapters
    size = bank.row_of(first).bytes
    small = new_bank(base, budget=4 * (2 * size + size // 2) // 3)  # three quarters are for vectors
    for name, item in zip(("first", "second", "third"), adapters, strict=True):
        add(any_service, name, item)
    residency = make(bank=small)
    residency.look()
    residency.look()
    assert small.digests() == {digest(second), digest(third)}  # the newest
    small.put(first)
    assert small.digests() == {digest(first), digest(third)}  # of those nobody asked for, the oldest goes first
    assert not small.put_if_room(second)
    remove(any_service, "third")
    residency.look()
    assert small.digests() == {digest(first), digest(second)}


def test_an_outage_is_logged_once_and_changes_nothing(
    any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
) -> None:
    add(any_service, "first", adapters[0])
    residency = make()
    residency._attempt()
    with capture_logs() as logs:
        rename(any_service, "adapter_versions", "away")
        residency._attempt()
        residency._attempt()
        rename(any_service, "away", "adapter_versions")
        residency._attempt()
    assert [entry["event"] for entry in logs] == ["adapters_not_compared", "adapters_compared_again"]
    assert bank.digests() == {digest(adapters[0])}


class TestAudit:
    """Of one adapter at a time."""

    @pytest.mark.parametrize("corrupt", ["overwritten", "anothers_numbers", "anothers_row"])
    def test_memory(
        self, any_service: Service, make: Make, base: LocalModel, adapters: list[Artifact], corrupt: str
    ) -> None:
        first, second, third = adapters
        served = Served.of(base)
        scheduler = Scheduler(served.batcher, served.bank)
        for name, item in zip(("first", "second", "third"), adapters, strict=True):
            add(any_service, name, item)
        residency = make(bank=served.bank, on_corrupted=scheduler.end_holders)
        residency.look()
        CORRUPTIONS[corrupt](served.bank, digest(first), digest(third))
        _, sound = served.begin(second)
        _, running = served.begin(first)
        held, waiting = generation(first)
        held.row = served.bank.row(digest(first))

        with capture_logs() as logs:
            residency._audit(digest(first))
            residency._audit(digest(second))
        assert [(entry["event"], entry["digest"]) for entry in logs] == [("adapter_corrupted", digest(first))]
        assert digest(first) not in served.bank

        scheduler.submit([held], None)  # it was prepared before the audit
        scheduler.start()
        wait_until(lambda: waiting.error and running.error and sound.reason, what="all ends")
        scheduler.stop()
        for collected in (running, waiting):
            assert isinstance(collected.error, ArtifactError)
            assert (collected.error.code, collected.text) == ("adapter_corrupted", "")
        assert sound.text == served.run(second)[1].text

        residency.look()  # it comes back as it is stored
        with capture_logs() as logs:
            residency._audit(digest(first))
        assert (logs, digest(first) in served.bank) == ([], True)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_database(
        self, any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact], swapped: bool
    ) -> None:
        first, second, _ = adapters
        add(any_service, "first", first)
        told: list[object] = []
        residency = make(on_corrupted=lambda *found: told.append(found))
        residency.look()
        damaged = bytearray(dumps(first))
        damaged[-3] ^= 1
        store(any_service, "first", artifact=dumps(second) if swapped else bytes(damaged))
        with capture_logs() as logs:
            residency.audit()
            residency._compare_at = 0.0
            residency.look()
        assert [(entry["event"], entry["where"]) for entry in logs] == [("adapter_corrupted", "database")]
        assert (len(bank), told) == (0, [])
        with pytest.raises(DigestError):  # what a request for it is told
            AdapterStore(any_service.sessions).load("first", digest(first))

    def test_every_one_has_its_turn(
        self, any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
    ) -> None:
        for name, item in zip(("first", "second", "third"), adapters, strict=True):
            add(any_service, name, item)
        residency = make(start=True, interval=0.01, audit_interval=0.0)
        wait_until(lambda: len(bank) == 3, what="all adapters")
        with capture_logs() as logs:
            for item in adapters:
                overwrite(bank, digest(item), "")
            wait_until(lambda: len(logs) == 3, what="three errors")
        assert {entry["digest"] for entry in logs} == {digest(item) for item in adapters}
        residency.stop()

    def test_one_that_goes_meanwhile_is_no_error(
        self, any_service: Service, make: Make, bank: AdapterBank, adapters: list[Artifact]
    ) -> None:
        first, second, _ = adapters
        add(any_service, "first", first)
        residency = make()
        residency.audit()
        residency.look()
        store(any_service, "first", digest=digest(second), artifact=dumps(second))
        with capture_logs() as logs:
            residency.audit()
            remove(any_service, "first")
            residency.audit()
        assert logs == []


def test_rows_are_compared_bit_by_bit(bank: AdapterBank, adapters: list[Artifact]) -> None:
    row, same = bank.row_of(adapters[0]), bank.row_of(adapters[0])
    for found in (row, same):
        found.numbers["d"].view(-1)[0] = 0.0
    assert row.equals(same)
    same.numbers["d"].view(-1)[0] = -0.0
    assert not row.equals(same)


@dataclass
class Served:
    """A model with its bank and batch, stepped by the test."""

    bank: AdapterBank
    batcher: Batcher

    @classmethod
    def of(cls, base: LocalModel, *, budget: int | None = None) -> Served:
        model = load_model(base, dtype=torch.float32, device="cpu")
        bank = AdapterBank(model, base_digest=base.digest, cache_dir=base.directory.parent, budget=budget)
        return cls(bank, Batcher(model, make_tiny_tokenizer(), bank, max_rows=4))

    def begin(self, adapter: Artifact | None, *, steps: int = 8) -> tuple[Generation, Collected]:
        """An answer that has joined the batch."""
        made, collected = generation(adapter, steps=steps)
        self.batcher.join([made])
        return made, collected

    def run(self, adapter: Artifact | None, *, steps: int = 8) -> tuple[Generation, Collected]:
        """A whole answer."""
        made, collected = self.begin(adapter, steps=steps)
        while self.batcher.running:
            self.batcher.step()
        return made, collected


def new_bank(base: LocalModel, *, budget: int | None = None) -> AdapterBank:
    model = load_model(base, dtype=torch.float32, device="cpu")
    return AdapterBank(model, base_digest=base.digest, cache_dir=base.directory.parent, budget=budget)


def generation(adapter: Artifact | None, *, steps: int = 8) -> tuple[Generation, Collected]:
    collected = Collected()
    wanted = None if adapter is None else digest(adapter)
    return Generation([5, 6, 7], wanted, steps, Sampling(temperature=0.0), collected), collected


def digest(artifact: Artifact) -> str:
    return artifact.manifest.digest


def overwrite(bank: AdapterBank, one: str, _other: str) -> None:
    bank.row(one).numbers["d"].view(-1)[0] += 1


def give_numbers(bank: AdapterBank, one: str, other: str) -> None:
    bank._pools[False].rows[one] = Row(bank.row(one).manifest, bank.row(other).numbers)


def give_row(bank: AdapterBank, one: str, other: str) -> None:
    bank._pools[False].rows[one] = bank.row(other)


CORRUPTIONS = {"overwritten": overwrite, "anothers_numbers": give_numbers, "anothers_row": give_row}


def for_task(artifact: Artifact, task: Task) -> Artifact:
    return loads(dumps(Artifact(artifact.manifest.model_copy(update={"task": task}), artifact.tensors)))


def row(
    service: Service, name: str, artifact: Artifact, *, stored: bytes | None = None, base_model: str = BASE_MODEL
) -> Adapter:
    return Adapter(
        id=name,
        project_id=service.project.id,
        base_model=base_model,
        digest=digest(artifact),
        manifest=artifact.manifest.model_dump(mode="json"),
        artifact=stored or dumps(artifact),
    )


def add(service: Service, name: str, artifact: Artifact, **values: Any) -> None:
    with service.sessions.begin() as session:
        session.add(row(service, name, artifact, **values))


def add_many(service: Service, count: int) -> None:
    """Rows that nobody loads, of two base models and as wide as real ones, and what PostgreSQL knows of them."""
    with service.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO adapters (id, created_at, project_id, base_model, task, digest, manifest, artifact) "
                "SELECT gen_random_uuid(), now(), :project, (ARRAY[:base, 'another'])[1 + number % 2], 'chat', "
                "sha256(number::text::bytea)::text, jsonb_build_object('modules', repeat(md5(number::text), 40)), '' "
                "FROM generate_series(1, :count) AS number"
            ),
            {"project": service.project.id, "base": BASE_MODEL, "count": count},
        )
    with service.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE adapters, adapter_versions"))


def plan(service: Service, query: Callable[[], object]) -> Any:
    """PostgreSQL's plan for a query."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(service.engine, "before_cursor_execute", note)
    query()
    event.remove(service.engine, "before_cursor_execute", note)
    ((statement, parameters),) = asked
    with service.engine.connect() as connection:
        return connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).scalar_one()


def store(service: Service, name: str, **values: object) -> None:
    """Change a row in its place."""
    with service.sessions.begin() as session:
        session.execute(update(Adapter).where(Adapter.id == name).values(**values))


def remove(service: Service, name: str) -> None:
    with service.sessions.begin() as session:
        session.execute(delete(Adapter).where(Adapter.id == name))


def rename(service: Service, old: str, new: str) -> None:
    with service.engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))
