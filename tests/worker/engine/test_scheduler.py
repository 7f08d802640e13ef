"""The scheduler: refuses when too much waits, and ends everything cleanly when it stops."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import make_tiny_tokenizer
from tests.uora.serving.test_generation import Collected
from uora.models import LocalModel, fetch, load_model
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Generation
from uora.serving.sampling import Sampling
from worker.engine.scheduler import EngineBusyError, EngineStoppedError, Scheduler


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    from tests.tiny import make_tiny_llama

    folder = tmp_path_factory.mktemp("scheduler")
    return fetch("tiny", f"path:{make_tiny_llama(folder / 'tiny')}", cache_dir=folder)


def new_scheduler(base: LocalModel) -> Scheduler:
    model = load_model(base, dtype=torch.float32, device="cpu")
    bank = AdapterBank(model, base_digest=base.digest)
    return Scheduler(Batcher(model, make_tiny_tokenizer(), bank, max_rows=2), bank)


def generation(max_tokens: int = 4) -> tuple[Generation, Collected]:
    collected = Collected()
    sampling = Sampling(temperature=0.0)
    return Generation([5, 6, 7], None, max_tokens, sampling, collected), collected


def test_too_many_waiting_requests_are_refused(base: LocalModel) -> None:
    scheduler = new_scheduler(base)  # not started: everything waits
    for _ in range(16):
        scheduler.submit([generation()[0]], None)
    with pytest.raises(EngineBusyError):
        scheduler.submit([generation()[0]], None)


def test_stopping_ends_waiting_and_running_requests(base: LocalModel) -> None:
    scheduler = new_scheduler(base)
    items = [generation(max_tokens=1000) for _ in range(5)]
    scheduler.submit([item for item, _ in items], None)
    scheduler.start()
    scheduler.stop()
    for _, collected in items:
        assert collected.reason is not None or isinstance(collected.error, EngineStoppedError)
    assert any(isinstance(collected.error, EngineStoppedError) for _, collected in items)
    with pytest.raises(EngineStoppedError):
        scheduler.submit([generation()[0]], None)
