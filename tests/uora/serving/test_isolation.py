"""No answer depends on what else the engine does: other adapters, cancellations, failures, evictions, short memory.

A state machine drives a `Batcher` and compares every answer with the one that its request gets alone, from an engine
that has never seen anything else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import nn
from transformers import PreTrainedModel

from tests.tiny import make_tiny_tokenizer
from tests.uora.toys import PROVENANCE, export
from uora.artifact import Artifact, loads
from uora.errors import AdapterNotFoundError
from uora.methods import attach
from uora.models import LocalModel, load_model
from uora.serving import lanes
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, Delta, Generation
from uora.serving.sampling import Sampling
from uora.spec import parse_adapter
from uora.svd import BaseWeights

#: Lanes of 16, 64 and 80 tokens, and memory for one whole context, so that answers outgrow lanes and start over.
SHORTEST_LANE, CONTEXT, CACHE, PIECE, ROWS = 16, 80, 96, 8, 8
#: Everything here ends in far fewer steps.
MANY_STEPS = 2000
UNKNOWN = "0" * 64

#: Settings of adapters, and whether they have hits.
ADAPTERS: tuple[tuple[dict[str, object], bool], ...] = (
    ({"method": "uora"}, False),
    ({"method": "uora"}, False),
    ({"method": "uora", "targets": "q,v"}, True),
    ({"method": "uora", "reinit_scope": "layer"}, True),
    ({"method": "uora", "frame_seed": 7, "targets": ("down_proj", "k_proj")}, False),
    ({"method": "uora", "r": 8}, True),
    ({"method": "vera", "targets": ("o_proj", "gate_proj")}, False),
    ({"method": "lora"}, False),
    ({"method": "lora", "targets": ("lm_head", "v_proj"), "lora_alpha": 3}, False),
    ({"method": "osora"}, False),
    ({"method": "osora", "targets": "q,v"}, False),
)
PROMPTS = tuple(tuple((7 * i * i + 5 * n) % 200 + 3 for i in range(n)) for n in (1, 7, 8, 15, 16, 30, 50))
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, stop=("e", "ab")),
    Sampling(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, top_logprobs=2),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, top_p=0.7, seed=2, frequency_penalty=-0.5, stop=("\n",)),
)


@dataclass(frozen=True)
class Request:
    """What is asked: places in `PROMPTS`, `ADAPTERS` (None is the base model) and `SAMPLINGS`."""

    prompt: int
    adapter: int | None
    max_tokens: int
    sampling: int = 0


def requests(adapters: int) -> st.SearchStrategy[Request]:
    """Few different ones, so that the answers they get alone are soon known."""
    return st.builds(
        Request,
        st.integers(0, len(PROMPTS) - 1),
        st.none() | st.integers(0, adapters - 1),
        st.sampled_from((1, 6, 20)),
        st.integers(0, len(SAMPLINGS) - 1),
    )


@dataclass
class Answer:
    """One request and all that came of it."""

    request: Request
    items: list[Delta | Exception] = field(default_factory=list)

    def begin(self, digest: str | None) -> Generation:
        """To be joined."""
        prompt, sampling = PROMPTS[self.request.prompt], SAMPLINGS[self.request.sampling]
        self.generation = Generation(prompt, digest, self.request.max_tokens, sampling, self.items.append)
        return self.generation

    @property
    def deltas(self) -> list[Delta]:
        return [item for item in self.items if isinstance(item, Delta)]

    @property
    def errors(self) -> list[Exception]:
        return [item for item in self.items if isinstance(item, Exception)]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return self.generation.generated

    @property
    def ended(self) -> bool:
        return bool(self.errors) or any(delta.finish_reason for delta in self.deltas)

    def check(self, alone: Answer) -> None:
        """Compare it with the answer that the same request got alone."""
        if self.errors:
            assert isinstance(self.items[-1], Exception)
            assert len(self.errors) == 1
        if self.errors or (self.generation.cancelled and not self.ended):
            assert alone.tokens[: len(self.tokens)] == self.tokens
            assert alone.text.startswith(self.text)
            return
        assert self.tokens == alone.tokens
        assert self.text == alone.text
        assert [delta.finish_reason for delta in self.deltas if delta.finish_reason] == [alone.deltas[-1].finish_reason]
        assert self.deltas[-1].finish_reason
        logprobs, expected = ([p for d in answer.deltas for p in d.logprobs] for answer in (self, alone))
        assert [p.bytes for p in logprobs] == [p.bytes for p in expected]


class InjectedError(Exception):
    """What a forward raises because a test wants it to."""


@dataclass
class Failure:
    """Let the next call of a module raise, once."""

    module: nn.Module
    fired: bool = False

    def __post_init__(self) -> None:
        self._handle = self.module.register_forward_pre_hook(self._raise)

    def _raise(self, *_: object) -> None:
        self.disarm()
        self.fired = True
        raise InjectedError

    def disarm(self) -> None:
        self._handle.remove()


class World:
    """A base model, its adapters, and the answers of requests that are served alone."""

    def __init__(self, model: PreTrainedModel, digest: str) -> None:
        self._model, self._digest = model, digest
        self._tokenizer = make_tiny_tokenizer()
        self._alone: dict[Request, Answer] = {}

    @cached_property
    def weights(self) -> BaseWeights:
        return BaseWeights.of_model(copy.deepcopy(self._model), digest=self._digest)

    @cached_property
    def adapters(self) -> list[Artifact]:
        return [self._artifact(seed, *described) for seed, described in enumerate(ADAPTERS)]

    def _artifact(self, seed: int, settings: dict[str, object], hit: bool) -> Artifact:
        spec = parse_adapter({"r": 4} | settings)
        model = attach(copy.deepcopy(self._model), spec, base=self.weights, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        if hit:
            for name, buffer in model.named_buffers():
                if "uora_hits" in name:
                    buffer.copy_((torch.arange(buffer.numel()) % 3).view_as(buffer))
        return loads(export(model, spec, PROVENANCE.model_copy(update={"base_digest": self._digest})))

    def digest(self, adapter: int | None) -> str | None:
        return None if adapter is None else self.adapters[adapter].manifest.digest

    def engine(self, *, budget: int | None = None) -> tuple[PreTrainedModel, AdapterBank, Batcher]:
        """A new one, with no adapter."""
        model = copy.deepcopy(self._model)
        bank = AdapterBank(model, base_digest=self._digest, weights=self.weights, budget=budget)
        batcher = Batcher(
            model, self._tokenizer, bank, max_rows=ROWS, context=CONTEXT, cache_tokens=CACHE, piece_tokens=PIECE
        )
        return model, bank, batcher

    def alone(self, request: Request) -> Answer:
        """The answer of an engine that has never had another adapter or request."""
        if request not in self._alone:
            _, bank, batcher = self.engine()
            if request.adapter is not None:
                bank.put(self.adapters[request.adapter])
            self._alone[request] = serve(batcher, [request], self)[0]
            assert self._alone[request].errors == []
        return self._alone[request]


def serve(batcher: Batcher, asked: Sequence[Request], world: World) -> list[Answer]:
    """Answers of requests that are asked at once."""
    answers = [Answer(request) for request in asked]
    batcher.join([answer.begin(world.digest(answer.request.adapter)) for answer in answers])
    drain(batcher)
    return answers


def drain(batcher: Batcher) -> None:
    """Let everything that runs end."""
    for _ in range(MANY_STEPS):
        if not batcher.running:
            return
        batcher.step()
    raise AssertionError("the batch does not end")


def check_nothing_is_left(batcher: Batcher, bank: AdapterBank) -> None:
    assert batcher.cache_tokens_in_use == 0
    assert batcher.free_rows == ROWS
    assert batcher.generations == []
    assert all(lane.rows == 0 and not lane.states.count_nonzero() for lane, _ in batcher._lanes.values())
    assert bank.composition is None


def memory(batcher: Batcher) -> int:
    """Tokens that lanes and prompts hold memory for."""
    decoding = sum(lane.rows * lane.capacity for lane, _ in batcher._lanes.values())
    return decoding + sum(answer.states.shape[-2] for answer in batcher._prompts if answer.states is not None)


def unused_rows_are_zero(batcher: Batcher) -> bool:
    return not any(lane.states[:, :, lane.rows :].count_nonzero() for lane, _ in batcher._lanes.values())


#: Modules by what has happened when they are called: nothing, keys of no, the first, and all layers written.
PLACES = (
    "model.embed_tokens",
    "model.layers.0.self_attn",
    "model.layers.0.self_attn.o_proj",
    "model.layers.1.self_attn.o_proj",
    "model.norm",
    "lm_head",
)


class Isolation(RuleBasedStateMachine):
    """An engine in use."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._answers: list[Answer] = []
        self._failures: list[Failure] = []

    @initialize(budget=st.sampled_from((None, 30_000)), loaded=st.sets(st.integers(0, len(ADAPTERS) - 1), min_size=4))
    def start(self, budget: int | None, loaded: set[int]) -> None:
        self._model, self._bank, self._batcher = self._world.engine(budget=budget)
        for adapter in loaded:
            self.put(adapter)

    @rule(adapter=st.integers(0, len(ADAPTERS) - 1))
    def put(self, adapter: int) -> None:
        item = self._world.adapters[adapter]
        self._bank.check(item.manifest)
        self._bank.put(item)

    @rule(adapter=st.integers(0, len(ADAPTERS) - 1))
    def remove(self, adapter: int) -> None:
        digest = self._world.digest(adapter)
        if digest in self._bank:
            self._bank.remove(digest)

    @rule(old=st.integers(0, len(ADAPTERS) - 1), new=st.integers(0, len(ADAPTERS) - 1))
    def replace(self, old: int, new: int) -> None:
        self.remove(old)
        self.put(new)

    @rule(asked=st.lists(requests(len(ADAPTERS)), min_size=1, max_size=3))
    def ask(self, asked: list[Request]) -> None:
        begun = [Answer(request) for request in asked[: self._batcher.free_rows]]
        resident = [a.request.adapter is None or self._world.digest(a.request.adapter) in self._bank for a in begun]
        self._batcher.join([answer.begin(self._world.digest(answer.request.adapter)) for answer in begun])
        for answer, known in zip(begun, resident, strict=True):
            if known:
                self._answers.append(answer)
            else:
                assert [type(item) for item in answer.items] == [AdapterNotFoundError]

    @rule()
    def ask_for_an_unknown_adapter(self) -> None:
        if self._batcher.free_rows:
            answer = Answer(Request(1, None, 6))
            self._batcher.join([answer.begin(UNKNOWN)])
            assert [type(item) for item in answer.items] == [AdapterNotFoundError]

    @rule(place=st.integers(0, ROWS - 1))
    def cancel(self, place: int) -> None:
        running = self._batcher.generations
        if running:
            running[place % len(running)].cancelled = True

    @rule(place=st.sampled_from(PLACES))
    def fail(self, place: str) -> None:
        """In the next step that runs the model."""
        failure = Failure(self._model.get_submodule(place))
        running = [answer for answer in self._answers if not answer.ended]
        self._batcher.step()
        failure.disarm()
        if failure.fired:
            self._failures.append(failure)
            hit = [answer for answer in running if answer.errors]
            assert hit
            assert all(isinstance(answer.errors[0], InjectedError) for answer in hit)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._batcher.step()
        assert [error for answer in self._answers for error in answer.errors] == []

    @invariant()
    def ended_answers_are_those_served_alone(self) -> None:
        for answer in self._answers:
            if answer.ended:
                answer.check(self._world.alone(answer.request))
        self._answers = [answer for answer in self._answers if not answer.ended]

    @invariant()
    def memory_suffices(self) -> None:
        if hasattr(self, "_batcher"):
            assert memory(self._batcher) <= CACHE
            assert unused_rows_are_zero(self._batcher)
            assert self._bank.composition is None

    def teardown(self) -> None:
        if not hasattr(self, "_batcher"):
            return
        drain(self._batcher)
        for answer in self._answers:
            assert answer.ended or answer.generation.cancelled
            answer.check(self._world.alone(answer.request))
        check_nothing_is_left(self._batcher, self._bank)


@pytest.fixture(scope="module")
def short_lanes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "_SHORTEST_LANE", SHORTEST_LANE)
        yield


def make_world(base: LocalModel, dtype: torch.dtype) -> World:
    return World(load_model(base, dtype=dtype, device="cpu"), base.digest)


@pytest.fixture(scope="module")
def world(tiny_base: LocalModel, short_lanes: None) -> World:
    return make_world(tiny_base, torch.float32)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def any_world(request: pytest.FixtureRequest, tiny_base: LocalModel, short_lanes: None) -> World:
    return make_world(tiny_base, request.param)


# Derandomised: rounding differs with the batch, so two equally likely tokens could swap in one draw of many.
def test_every_answer_is_the_one_its_request_gets_alone(world: World) -> None:
    run_state_machine_as_test(
        lambda: Isolation(world),
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def engine_with_all(world: World) -> tuple[PreTrainedModel, AdapterBank, Batcher]:
    model, bank, batcher = world.engine()
    for item in world.adapters:
        bank.put(item)
    return model, bank, batcher


def test_adapters_and_requests_differ(world: World) -> None:
    """Otherwise no test here could tell one's answer from another's."""
    answers = [world.alone(Request(2, adapter, 6, 2)) for adapter in (None, *range(len(ADAPTERS)))]
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)
    assert len({tuple(world.alone(Request(2, 0, 6, sampling)).tokens) for sampling in range(len(SAMPLINGS))}) > 3


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_that_raises_leaves_no_trace(world: World, place: str) -> None:
    model, bank, batcher = engine_with_all(world)
    asked = [Request(0, 0, 20), Request(1, 7, 20), Request(6, 2, 6), Request(3, 8, 6)]
    early, late = ([Answer(request) for request in asked[i : i + 2]] for i in (0, 2))
    for answers in (early, late):
        batcher.join([answer.begin(world.digest(answer.request.adapter)) for answer in answers])
        batcher.step()
    failure = Failure(model.get_submodule(place))
    batcher.step()
    assert failure.fired
    assert bank.composition is None
    drain(batcher)
    for answer in early + late:
        answer.check(world.alone(answer.request))
    assert [len(answer.errors) for answer in early] == [0, 0]  # the prompt that was read is to blame
    assert sum(len(answer.errors) for answer in late) == 1
    for answer in serve(batcher, asked, world):
        assert answer.errors == []
        answer.check(world.alone(answer.request))
    check_nothing_is_left(batcher, bank)


def test_keys_of_a_failed_forward_leave_with_their_answer(world: World) -> None:
    model, _, batcher = engine_with_all(world)
    first, second, third = (Answer(Request(prompt, None, 6)) for prompt in (0, 1, 6))
    for answer in (first, second, third):
        batcher.join([answer.begin(None)])
        batcher.step()
        if answer is second:
            batcher.step()
    failure = Failure(model.get_submodule("model.norm"))
    batcher.step()
    assert failure.fired
    second.generation.cancelled = True
    batcher.step()
    assert unused_rows_are_zero(batcher)


@pytest.mark.parametrize("adapter", [None, 0, 7, 8, 9])
def test_a_prompt_is_read_in_pieces_where_nothing_else_runs(any_world: World, adapter: int | None) -> None:
    """A step then chooses no token; 8 adapts the output embeddings."""
    request = Request(6, adapter, 6)
    assert len(PROMPTS[request.prompt]) > 2 * PIECE
    answer = any_world.alone(request)
    assert answer.tokens


def test_short_memory_is_kept_to(world: World) -> None:
    """Answers that outgrow their lanes start over, and so does a prompt that is in their way."""
    _, bank, batcher = engine_with_all(world)
    answers = [Answer(Request(prompt, adapter, 20)) for prompt, adapter in ((2, 0), (4, 1), (3, 7), (1, None), (5, 9))]
    batcher.join([answer.begin(world.digest(answer.request.adapter)) for answer in answers])
    while batcher.running:
        batcher.step()
        assert memory(batcher) <= CACHE
    for answer in answers:
        assert answer.errors == []
        answer.check(world.alone(answer.request))
    check_nothing_is_left(batcher, bank)


def test_the_same_prompt_is_computed_for_each_adapter(world: World) -> None:
    """Keys and values are an adapter's own: a cache of prefixes would have to know whose they are."""
    _, _, batcher = engine_with_all(world)
    asked = [Request(5, adapter, 6) for adapter in (None, 0, 1, 7, 9)]
    together = serve(batcher, asked, world)
    one_by_one = [serve(batcher, [request], world)[0] for request in asked + asked[::-1]]
    for answer in together + one_by_one:
        answer.check(world.alone(answer.request))


def test_greedy_tokens_do_not_depend_on_the_batch(any_world: World) -> None:
    """Answers decode in a batch of one row and of eight, of the base model, of one family and of all."""
    for adapters in ([None] * 8, [0] * 8, [None, 0, 2, 5, 6, 7, 8, 9]):
        _, _, batcher = engine_with_all(any_world)
        asked = [Request(place % 3, adapter, 6) for place, adapter in enumerate(adapters)]
        for answer in serve(batcher, asked, any_world):
            assert answer.tokens == any_world.alone(answer.request).tokens
