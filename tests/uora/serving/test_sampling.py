"""The choice of tokens: what a row gets is its own, whatever else is in the batch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import make_tiny_tokenizer
from uora.errors import GenerationError, SamplingError
from uora.serving.grammar import Grammars
from uora.serving.sampling import Sampled, Sampler, Sampling, sample

TOKENIZER = make_tiny_tokenizer()
VOCABULARY = len(TOKENIZER) + 5
GRAMMARS = Grammars(TOKENIZER, VOCABULARY, frozenset({TOKENIZER.eos_token_id}))
OBJECT = GRAMMARS.json_object()

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.999999, 0.9, 0.2]),
    seed=st.integers(-(2**63), 2**63 - 1),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -1.5, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=3),
    top_logprobs=st.sampled_from([None, None, 0, 3, 20]),
    grammar=st.sampled_from([None, None, OBJECT]),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_logits(*, steps: int, rows: int, seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(steps, rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def run(logits: torch.Tensor, samplings: list[Sampling]) -> list[list[Sampled]]:
    """What each row gets in ``logits (steps, rows, vocabulary)``."""
    samplers = [Sampler(sampling, vocabulary=logits.shape[-1]) for sampling in samplings]
    steps = [sample(step, samplers) for step in logits]
    for results in steps:
        for result in results:
            assert isinstance(result, Sampled), result
    return [list(row) for row in zip(*steps, strict=True)]  # type: ignore[arg-type]


def one(logits: list[float] | torch.Tensor, sampling: Sampling) -> Sampled:
    row = torch.as_tensor(logits)
    return run(row[None, None], [sampling])[0][0]


@settings(deadline=None, max_examples=60)
@given(st.lists(samplings, min_size=2, max_size=6), st.integers(0, 1000), dtypes)
def test_a_row_alone_gets_what_it_gets_in_any_batch(drawn: list[Sampling], seed: int, dtype: torch.dtype) -> None:
    logits = random_logits(steps=4, rows=len(drawn), seed=seed).to(dtype)
    together = run(logits, drawn)
    for row, sampling in enumerate(drawn):
        assert run(logits[:, row : row + 1], [sampling])[0] == together[row]


def test_a_row_of_a_large_vocabulary_alone_gets_what_it_gets_in_a_batch() -> None:
    # Threads share reductions of one long row, and rows of many: sums would differ in their rounding.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        drawn = [Sampling(temperature=1.5, top_p=p, seed=k, top_logprobs=2) for k, p in enumerate([1, 0.9, 0.3, 1])]
        logits = random_logits(steps=3, rows=4, seed=0, vocabulary=70_000) / 8  # nearly flat: the nuclei are wide
        together = run(logits, drawn)
        assert [run(logits[:, k : k + 1], [sampling])[0] for k, sampling in enumerate(drawn)] == together
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p: float) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    probabilities = (logits / 0.8).softmax(0)
    order = probabilities.argsort(descending=True)
    size = int((probabilities[order].cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(order)
    nucleus = torch.zeros(5).index_copy(0, order[:size], probabilities[order[:size]])
    nucleus /= nucleus.sum()
    rows = 20_000
    samplers = [Sampler(Sampling(temperature=0.8, top_p=top_p, seed=k), vocabulary=5) for k in range(rows)]
    counts = Counter(r.token for r in sample(logits.expand(rows, 5), samplers) if isinstance(r, Sampled))
    for token, expected in enumerate(nucleus.tolist()):
        deviation = math.sqrt(expected * (1 - expected) / rows)
        assert abs(counts[token] / rows - expected) <= 5 * deviation


@settings(deadline=None)
@given(top_p=st.floats(0.05, 1.0), seed=st.integers(0, 100), vocabulary=st.sampled_from([20, 1000]))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, seed: int, vocabulary: int) -> None:
    logits = random_logits(steps=1, rows=1, seed=seed, vocabulary=vocabulary)[0, 0] / 4
    order = logits.softmax(0).sort(descending=True)
    size = int((order.values.cumsum(0) < top_p).sum()) + 1
    nucleus = set(order.indices[:size].tolist())
    samplers = [Sampler(Sampling(top_p=top_p, seed=k), vocabulary=vocabulary) for k in range(200)]
    drawn = {result.token for result in sample(logits.expand(200, -1), samplers) if isinstance(result, Sampled)}
    assert drawn <= nucleus


def test_the_largest_random_number_draws_a_token_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "uniform", lambda _: float(np.nextafter(np.float32(1), np.float32(0))))
    impossible = [0.0, 0.1, 0.2, -math.inf, -math.inf]
    for top_p in (1.0, 0.9):
        assert one(impossible, Sampling(top_p=top_p)).token in range(3)


def test_seeds_decide_and_their_absence_does_not() -> None:
    logits = torch.zeros(30, 1, 100)
    first, again, other = (run(logits, [Sampling(seed=seed)])[0] for seed in (3, 3, 4))
    assert first == again != other
    assert run(logits, [Sampling()]) != run(logits, [Sampling()])


def test_the_likeliest_token_is_the_first_of_equals() -> None:
    assert one([0.0, 3.0, 3.0], Sampling(temperature=0.0)).token == 1
    assert one([0.0, 3.0, 1.0], Sampling(temperature=1e-30, seed=0)).token == 1
    assert one([0.0, 3.0, 1.0], Sampling(temperature=1e-4, seed=0)).token == 1


def test_bias_and_penalties_add_up() -> None:
    logits = torch.tensor([1.0, 0.6, 0.0]).expand(4, 1, 3)

    def greedy(**options: object) -> list[int]:
        return [s.token for s in run(logits, [Sampling(temperature=0.0, **options)])[0]]  # type: ignore[arg-type]

    assert greedy(presence_penalty=0.5) == [0, 1, 0, 0]  # once, however often
    assert greedy(frequency_penalty=0.5) == [0, 1, 0, 1]  # 1, 0.6 | 0.5, 0.6 | 0.5, 0.1 | 0, 0.1
    assert greedy(logit_bias={2: 100.0}) == [2, 2, 2, 2]
    assert greedy(logit_bias={0: -100.0}) == [1, 1, 1, 1]
    assert greedy(logit_bias={2: 1.2}, frequency_penalty=0.5) == [2, 0, 2, 1]


def test_log_probabilities_are_the_models_own() -> None:
    logits = random_logits(steps=1, rows=1, seed=0)[0, 0]
    sampling = Sampling(temperature=0.0, logit_bias={7: 100.0}, top_logprobs=2)
    found = one(logits, sampling)
    own = logits.log_softmax(0)
    assert found.token == 7
    assert found.logprob == pytest.approx(float(own[7]))
    assert [token for token, _ in found.top] == own.topk(2).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(own.topk(2).values.tolist())
    assert one(logits, Sampling(temperature=0.0)).logprob is None
    assert one(logits, Sampling(temperature=0.0, top_logprobs=0)).top == ()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(samplings, min_size=3, max_size=5),
    st.sampled_from([math.nan, math.inf]),
    st.integers(0, VOCABULARY - 1),
)
def test_logits_that_are_not_finite_are_their_rows_failure(drawn: list[Sampling], value: float, token: int) -> None:
    logits = random_logits(steps=1, rows=len(drawn), seed=0)
    healthy = run(logits[:, 1:], drawn[1:])
    logits[0, 0, token] = value
    results = sample(logits[0], [Sampler(sampling, vocabulary=VOCABULARY) for sampling in drawn])
    assert isinstance(results[0], GenerationError)
    assert results[1:] == [row[0] for row in healthy]


def test_a_grammar_without_a_token_is_its_rows_failure() -> None:
    logits = torch.zeros(2, VOCABULARY)
    ended = Sampler(Sampling(temperature=0.0, grammar=OBJECT), vocabulary=VOCABULARY)
    with pytest.raises(GenerationError):
        ended.accept(5)  # no object begins so
    failed, good = sample(logits, [ended, Sampler(Sampling(temperature=0.0), vocabulary=VOCABULARY)])
    assert isinstance(failed, GenerationError)
    assert good == Sampled(0)


def test_an_impossible_grammar_fails_though_other_tokens_are_possible() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, TOKENIZER.convert_tokens_to_ids("{")] = -math.inf
    (result,) = sample(logits, [Sampler(Sampling(seed=0, grammar=OBJECT), vocabulary=VOCABULARY)])
    assert isinstance(result, GenerationError)


def test_options_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(SamplingError, match="token 10, the model's tokens are 0 to 9"):
        Sampler(Sampling(logit_bias={10: 1.0}), vocabulary=10)
    with pytest.raises(SamplingError, match="logit_bias"):
        Sampler(Sampling(logit_bias={-1: 1.0}), vocabulary=10)
    with pytest.raises(SamplingError, match="0 to 20"):
        Sampler(Sampling(top_logprobs=21), vocabulary=10)


class _Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_rows() -> None:
    def operations(samplings: list[Sampling]) -> int:
        samplers = [Sampler(sampling, vocabulary=50) for sampling in samplings]
        logits = torch.zeros(len(samplers), 50)
        with _Operations() as seen:
            sample(logits, samplers)
        return seen.count

    greedy = Sampling(temperature=0.0)
    asking = [Sampling(top_p=0.5), Sampling(logit_bias={1: 1.0}), Sampling(top_logprobs=2, temperature=0.0)]
    assert operations([greedy] * 30) == operations([greedy]) < 10
    assert operations([greedy] * 30 + asking) == operations(asking)
    assert operations(asking * 2) == operations(asking * 5)
