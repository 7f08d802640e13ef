"""The scheduler: shares rows fairly, refuses when too much waits, keeps deadlines, and outlives what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import count
from time import monotonic
from typing import Any

import pytest
import torch

from tests.api.support import wait_until
from tests.tiny import make_tiny_llama, make_tiny_tokenizer
from tests.uora.serving.test_generation import Collected
from uora.errors import DeadlineError
from uora.models import LocalModel, fetch, load_model
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Delta, Generation
from uora.serving.sampling import Sampling
from worker.engine import scheduler as scheduling
from worker.engine.scheduler import EngineBusyError, EngineStoppedError, Scheduler

#: Never ends by itself.
ENDLESS = Sampling(temperature=0.0, logit_bias={make_tiny_tokenizer().eos_token_id: -100.0}, top_logprobs=0)

NewScheduler = Callable[..., Scheduler]


class Heard(Collected):
    """All that an answer emitted, and whether it was ended more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []
        self.on_delta: Callable[[], None] = lambda: None

    def __call__(self, item: Delta | Exception) -> None:
        super().__call__(item)
        if isinstance(item, Exception):
            self.errors.append(item)
        else:
            self.on_delta()

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("scheduler")
    return fetch("tiny", f"path:{make_tiny_llama(folder / 'tiny')}", cache_dir=folder)


@pytest.fixture
def new_scheduler(base: LocalModel) -> Iterator[NewScheduler]:
    """Makes schedulers, and stops those that were started."""
    made: list[Scheduler] = []

    def make(*, rows: int = 2, turn: threading.Lock | None = None) -> Scheduler:
        model = load_model(base, dtype=torch.float32, device="cpu")
        bank = AdapterBank(model, base_digest=base.digest)
        made.append(Scheduler(Batcher(model, make_tiny_tokenizer(), bank, max_rows=rows), bank, turn))
        return made[-1]

    yield make
    for scheduler in made:
        if scheduler._thread.is_alive():
            scheduler.stop()


def generation(project: str = "", *, max_tokens: int = 4, **options: Any) -> tuple[Generation, Heard]:
    heard = Heard()
    return Generation([5, 6, 7], None, max_tokens, ENDLESS, heard, project=project, **options), heard


def several(number: int, project: str = "", **options: Any) -> list[Generation]:
    return [generation(project, **options)[0] for _ in range(number)]


def spy_on_joining(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """The answers that got a row, in this order."""
    joined: list[Generation] = []
    join = scheduler._batcher.join

    def watched(generations: list[Generation]) -> None:
        joined.extend(generations)
        join(generations)

    monkeypatch.setattr(scheduler._batcher, "join", watched)
    return joined


def answer(scheduler: Scheduler) -> str:
    """What a new answer says."""
    item, heard = generation(max_tokens=8)
    scheduler.submit([item], None)
    wait_until(lambda: heard.ended)
    assert heard.reason == "length", heard.error
    return heard.text


class TestSharing:
    def test_a_flood_does_not_starve_another_project(
        self, new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = 13  # the half of 8 batches has room for the flood
        scheduler = new_scheduler(rows=rows)
        joined = spy_on_joining(scheduler, monkeypatch)
        flood = [generation("a", max_tokens=4 + number) for number in range(50)]
        single, heard = generation("b")

        def come_when_a_row_is_about_to_be_free() -> None:
            if flood[0][1].reason:
                scheduler.submit([single], None)

        flood[0][1].on_delta = come_when_a_row_is_about_to_be_free
        scheduler.submit([item for item, _ in flood], None)
        scheduler.start()
        wait_until(lambda: heard.ended and all(other.ended for _, other in flood))
        assert joined.index(single) == rows
        assert [item for item in joined if item is not single] == [item for item, _ in flood]

    def test_rows_that_run_count(self, new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        scheduler = new_scheduler(rows=4)
        joined = spy_on_joining(scheduler, monkeypatch)
        first, heard = generation("a", max_tokens=20)

        def let_more_come() -> None:
            if len(first.generated) == 1:
                scheduler.submit(several(4, "a"), None)
                scheduler.submit(several(4, "b"), None)

        heard.on_delta = let_more_come
        scheduler.submit([first], None)
        scheduler.start()
        wait_until(lambda: len(joined) == 9)
        assert "".join(item.project for item in joined[:4]) == "abab"


class TestBackPressure:
    def test_a_project_holds_no_more_places_than_it_leaves_free(self, new_scheduler: NewScheduler) -> None:
        scheduler = new_scheduler()  # 16 places; not started: everything waits
        for project, places in {"a": 8, "b": 4, "c": 2, "d": 1}.items():
            for item in several(places, project):
                scheduler.submit([item], None)
            with pytest.raises(EngineBusyError) as refused:
                scheduler.submit(several(1, project), None)
            assert refused.value.own_share
        with pytest.raises(EngineBusyError) as refused:
            scheduler.submit(several(1, "e"), None)
        assert not refused.value.own_share
        assert scheduler.waiting == 15

    def test_the_answers_of_a_request_are_queued_together(self, new_scheduler: NewScheduler) -> None:
        scheduler = new_scheduler()
        scheduler.submit(several(6), None)
        with pytest.raises(EngineBusyError):
            scheduler.submit(several(3), None)
        assert scheduler.waiting == 6
        scheduler.submit(several(2), None)
        assert scheduler.waiting == 8

    def test_when_to_come_again_is_how_long_answers_take(
        self, new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scheduler = new_scheduler()
        with pytest.raises(EngineBusyError) as refused:
            scheduler.submit(several(9), None)
        assert refused.value.retry_after == 1.0
        clock = count(step=60)
        monkeypatch.setattr(scheduling, "monotonic", lambda: next(clock))  # a minute goes by at every look
        scheduler.start()
        answer(scheduler)
        wait_until(lambda: not scheduler.running)
        with pytest.raises(EngineBusyError) as refused:
            scheduler.submit(several(9), None)
        assert refused.value.retry_after > 6.0

    def test_cancelled_ones_hold_no_places(self, new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        scheduler = new_scheduler(rows=1)
        joined = spy_on_joining(scheduler, monkeypatch)
        item, heard = generation(max_tokens=900)
        waiting = [generation() for _ in range(3)]
        scheduler.submit([item, *(other for other, _ in waiting)], None)
        places: list[int] = []

        def cancel_the_others() -> None:
            places.append(scheduler.waiting)
            for other, _ in waiting:
                other.cancelled = True
            item.cancelled = len(places) == 2

        heard.on_delta = cancel_the_others
        scheduler.start()
        wait_until(lambda: scheduler.running == scheduler.waiting == 0)
        assert places == [3, 0]
        assert joined == [item]
        assert not any(other.ended or other.text for _, other in waiting)


class TestDeadlines:
    def test_of_a_running_answer(self, new_scheduler: NewScheduler) -> None:
        scheduler = new_scheduler()
        item, heard = generation(max_tokens=900)
        other, other_heard = generation(max_tokens=20)

        def expire() -> None:
            item.deadline = monotonic()

        heard.on_delta = expire
        scheduler.submit([item, other], None)
        scheduler.start()
        wait_until(lambda: heard.ended and other_heard.ended)
        wait_until(lambda: not scheduler.running)
        assert [type(error) for error in heard.errors] == [DeadlineError]
        assert isinstance(heard.error, DeadlineError)
        assert heard.error.code == "deadline_exceeded"
        assert len(item.generated) == 1
        assert (other_heard.reason, other_heard.errors) == ("length", [])

    def test_of_a_waiting_answer(self, new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        scheduler = new_scheduler(rows=1)
        joined = spy_on_joining(scheduler, monkeypatch)
        item, heard = generation(max_tokens=20)
        late, late_heard = generation(deadline=monotonic())
        in_time, in_time_heard = generation(deadline=monotonic() + 600)
        scheduler.submit([item, late, in_time], None)
        scheduler.start()
        wait_until(lambda: heard.ended and in_time_heard.ended)
        assert joined == [item, in_time]
        assert [type(error) for error in late_heard.errors] == [DeadlineError]
        assert heard.reason == in_time_heard.reason == "length"

    def test_of_a_stopped_engine_one_error_is_enough(self, new_scheduler: NewScheduler) -> None:
        scheduler = new_scheduler(rows=1)
        item, heard = generation(max_tokens=900, deadline=monotonic())
        scheduler.submit([item], None)
        scheduler.start()
        wait_until(lambda: heard.ended)
        scheduler.stop()
        assert len(heard.errors) == 1


class TestFaults:
    @pytest.mark.parametrize("part", ["_forward", "_advance", "_into_lanes", "_make_room", "_append", "_next_pieces"])
    def test_one_leaves_no_trace_in_the_next_answers(
        self, new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        scheduler = new_scheduler()
        scheduler.start()
        expected = answer(scheduler)
        real = getattr(scheduler._batcher, part)
        faults = iter([RuntimeError("a fault"), RuntimeError("another")])

        def faulty(*args: Any) -> Any:
            if fault := next(faults, None):
                raise fault
            return real(*args)

        items = [generation(max_tokens=900) for _ in range(4)]  # two waves, as there are two rows
        monkeypatch.setattr(scheduler._batcher, part, faulty)
        scheduler.submit([item for item, _ in items], None)
        wait_until(lambda: all(heard.ended for _, heard in items))
        assert [[str(error) for error in heard.errors] for _, heard in items] == [["a fault"]] * 2 + [["another"]] * 2
        assert answer(scheduler) == expected
        wait_until(lambda: scheduler.running == scheduler.waiting == 0)
        assert scheduler._batcher.free_rows == 2

    def test_a_listener_that_is_gone_is_no_concern_of_the_others(self, new_scheduler: NewScheduler) -> None:
        scheduler = new_scheduler()
        scheduler.start()
        expected = answer(scheduler)
        item, heard = generation(max_tokens=900)

        def gone() -> None:
            raise RuntimeError("Event loop is closed")

        heard.on_delta = gone
        scheduler.submit([item], None)
        wait_until(lambda: heard.ended)
        assert answer(scheduler) == expected


def test_the_device_is_taken_for_a_step_only(new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = threading.Lock()
    scheduler = new_scheduler(turn=turn)
    held: list[bool] = []
    step = scheduler._batcher.step

    def watched() -> None:
        held.append(turn.locked())
        step()

    monkeypatch.setattr(scheduler._batcher, "step", watched)
    scheduler.start()
    answer(scheduler)
    wait_until(lambda: not scheduler.running)
    assert held
    assert all(held)
    with turn:
        item, heard = generation()
        scheduler.submit([item], None)
        wait_until(lambda: scheduler.running == 1)
        assert not heard.text
    wait_until(lambda: heard.ended)


def test_stopping_ends_waiting_and_running_requests(new_scheduler: NewScheduler) -> None:
    scheduler = new_scheduler()
    items = [generation(max_tokens=900) for _ in range(5)]
    scheduler.submit([item for item, _ in items], None)
    scheduler.start()
    scheduler.stop()
    for _, heard in items:
        assert [type(error) for error in heard.errors] == [EngineStoppedError]
    with pytest.raises(EngineStoppedError):
        scheduler.submit([generation()[0]], None)
