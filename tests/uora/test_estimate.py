"""What a training is foretold to take grows with the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.uora.data.files import write_lines
from uora.data import DatasetReport, Example, build_report
from uora.estimate import Costs, Prices, Sizes, Work, estimate
from uora.spec import Hyperparameters, TrainingOptions, TrainingSpec, UoraSpec

counts = st.integers(1, 10**6)
sizes = st.builds(Sizes, *[counts] * 7)
works = st.builds(Work, sizes, counts, counts, counts, counts, counts)
ONE = Work(Sizes(1, 1, 1, 1, 1, 1, 1), 1, 1, 1, 1, 1)
coefficients = st.just(0.0) | st.floats(1e-6, 1)
costs_of_any_machine = st.builds(
    Costs,
    st.just("here"),
    st.fixed_dictionaries(dict.fromkeys(ONE.seconds_terms(), coefficients)),
    st.fixed_dictionaries(dict.fromkeys(ONE.memory_terms(), coefficients)),
)


@given(work=works, costs=costs_of_any_machine, more=counts)
def test_nothing_gets_cheaper_by_more_work(work: Work, costs: Costs, more: int) -> None:
    for other in (
        replace(work, tokens=work.tokens + more, learned_tokens=work.learned_tokens * (1 + more / work.tokens)),
        replace(work, rank=work.rank + more),
        replace(work, sizes=replace(work.sizes, linear_parameters=work.sizes.linear_parameters + more)),
        replace(work, sizes=replace(work.sizes, adapter_numbers=work.sizes.adapter_numbers + more)),
    ):
        assert costs.step_seconds(other) >= costs.step_seconds(work) * (1 - 1e-9)
        assert costs.memory_bytes(other) >= costs.memory_bytes(work) * (1 - 1e-9)


@pytest.fixture
def report(tmp_path: Path) -> DatasetReport:
    """Ten rows of eight tokens, two of them learned."""
    path = write_lines(tmp_path / "upload", [{"text": f"row {i}"} for i in range(10)])
    example = Example([1] * 8, [-100] * 6 + [1, 1])
    return build_report(path, "completion", encode=lambda _: example, decode=lambda _: "", max_length=None)


def spec(batch_size: int, n_epochs: int = 3, accumulated: int = 1) -> TrainingSpec:
    return TrainingSpec(
        adapter=UoraSpec(r=4),
        hyperparameters=Hyperparameters(n_epochs=n_epochs, batch_size=batch_size, learning_rate_multiplier=1.0),
        options=TrainingOptions(gradient_accumulation_steps=accumulated),
        learning_rate=0.1,
        seed=0,
    )


SIZES = Sizes(
    linear_parameters=100,
    linear_features=40,
    adapted_features=20,
    adapted_layers=2,
    adapter_numbers=50,
    vocabulary=9,
    hidden=5,
)


def test_a_run_is_its_steps(report: DatasetReport) -> None:
    only_base = Costs("here", dict.fromkeys(ONE.seconds_terms(), 0.0) | {"base": 0.5}, {})
    costs = replace(only_base, memory=dict.fromkeys(ONE.memory_terms(), 0.0) | {"adapter": 4.0})
    found = estimate(spec(batch_size=5), SIZES, report, tokens_at_once=1024, costs=costs)
    assert (found.tokens, found.memory_bytes, found.machine) == (3 * 80, 200, "here")
    assert found.seconds == pytest.approx(0.5 * 100 * 3 * 80)


@given(costs=costs_of_any_machine, batch=st.integers(1, 10), more=st.integers(0, 9))
def test_a_larger_batch_needs_no_less_memory(costs: Costs, batch: int, more: int) -> None:
    work = Work(SIZES, 4, 8.0 * batch, 2.0 * batch, 8.0, 32)
    larger = replace(work, tokens=8.0 * (batch + more), learned_tokens=2.0 * (batch + more))
    assert costs.memory_bytes(larger) >= costs.memory_bytes(work) * (1 - 1e-9)


def test_without_measurements_only_tokens_are_told(report: DatasetReport) -> None:
    found = estimate(spec(5), SIZES, report, tokens_at_once=1024, costs=None)
    assert (found.tokens, found.seconds, found.memory_bytes, found.machine) == (3 * 80, None, None, None)


def test_a_price_is_of_seconds_and_of_tokens() -> None:
    prices = Prices(per_second=0.5, per_thousand_tokens=2.0)
    assert prices.cost(tokens=3000, seconds=10.0) == pytest.approx(5.0 + 6.0)
    assert prices.cost(tokens=3000, seconds=None) is None
    assert Prices(per_thousand_tokens=2.0).cost(tokens=3000, seconds=None) == pytest.approx(6.0)
    assert Prices().cost(tokens=3000, seconds=None) == 0
