"""Generation with continuous batching: requests of any adapters join and leave the running batch between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from uora.errors import SpecError
from uora.serving.bank import AdapterBank
from uora.serving.composition import Composition
from uora.serving.fusing import fuse
from uora.serving.lanes import LANES, Decoding, Lane, Plan, Reading, StateShape, lane_capacity
from uora.serving.rows import Row
from uora.serving.sampling import Sampled, Sampler, Sampling, TokenLogprob, sample
from uora.serving.text import TextStream, TokenBytes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """New text of an answer with its tokens' log probabilities, if wanted, and the reason once it is finished."""

    text: str
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(eq=False)
class Generation:
    """One answer being generated.

    Attributes:
        prompt: token ids.
        adapter: digest of its adapter; None for the base model.
        max_tokens: tokens to generate at most.
        sampling: how tokens are chosen.
        emit: called from the generating thread with each `Delta`, or with the exception that ended it.
        project: whom it is for, in the sharing of rows.
        deadline: ``time.monotonic`` after which nobody wants it; None for no such time.
        cancelled: set from any thread; the row leaves at the next step.
        row: its adapter's, kept from when it was found resident; None takes it from the bank on joining.
        joined_at: ``time.monotonic`` when it got its place in the batch; None while it waits.
    """

    prompt: Sequence[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling
    emit: Callable[[Delta | Exception], None]
    project: str = ""
    deadline: float | None = None
    cancelled: bool = False
    row: Row | None = None
    joined_at: float | None = None
    generated: list[int] = field(default_factory=list)


class _Answer:
    """A generation in the batch.

    Attributes:
        tokens: prompt and answer; all but the last have their states in the cache once it decodes.
        known: how many of them have.
        states: of a prompt that is being read; None before, and when they lie in a lane.
    """

    def __init__(self, generation: Generation, adapter: Row | None, tokens: TokenBytes, vocabulary: int) -> None:
        self.generation = generation
        self.adapter = adapter
        self.text = TextStream(tokens, generation.sampling.stop)
        self.sampler = Sampler(generation.sampling, vocabulary=vocabulary)
        self.tokens = list(generation.prompt)
        self.known = 0
        self.states: Tensor | None = None

    def advance(self, sampled: Sampled, end_tokens: frozenset[int]) -> bool:
        """Emit what a token adds to the answer; returns whether the answer is finished."""
        generation = self.generation
        generation.generated.append(sampled.token)
        self.tokens.append(sampled.token)
        ended = sampled.token in end_tokens
        pieces = [] if ended else [self.text.feed(sampled)]
        reason: FinishReason | None = None
        if ended or self.text.stopped or self.sampler.finished:
            reason = "stop"
        elif len(generation.generated) >= generation.max_tokens:
            reason = "length"
        if reason is not None:
            pieces.append(self.text.flush())
        text = "".join(piece.text for piece in pieces)
        logprobs = tuple(logprob for piece in pieces for logprob in piece.logprobs)
        if self.text.stopped:
            reason = "stop"
        if text or logprobs or reason:
            generation.emit(Delta(text, reason, len(generation.generated), logprobs))
        return reason is not None


@dataclass(frozen=True)
class _Step:
    """What one forward does.

    Attributes:
        decoding: answers that get one more token, lane by lane.
        reading: answers whose prompts go on, each with the token up to which it is read.
    """

    decoding: list[_Answer]
    reading: list[tuple[_Answer, int]]

    @property
    def answers(self) -> list[_Answer]:
        """All of them, in the order of their tokens."""
        return self.decoding + [answer for answer, _ in self.reading]

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Each one's first token and the token after its last."""
        return [(answer.known, answer.known + 1) for answer in self.decoding] + [
            (answer.known, stop) for answer, stop in self.reading
        ]

    @property
    def choosing(self) -> list[_Answer]:
        """Those whose last token was run, so that the next is to be chosen."""
        return self.decoding + [answer for answer, stop in self.reading if stop == len(answer.tokens)]


class Batcher:
    """The running batch. One thread calls `join` and `step`; it alone touches the model.

    Every step is one forward over the next tokens of all answers and pieces of the prompts that wait, so that a long
    prompt delays the others by no more than its pieces.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        bank: AdapterBank,
        *,
        max_rows: int,
        context: int = 2048,
        cache_tokens: int | None = None,
        piece_tokens: int = 256,
    ) -> None:
        """
        Args:
            model: the base model, whose adapters are in ``bank``; `check_servable`.
            tokenizer: its tokenizer.
            bank: the adapters.
            max_rows: answers that run at the same time.
            context: tokens that a prompt and its answer may have together.
            cache_tokens: tokens whose keys and values there is memory for; None for ``max_rows`` whole contexts.
            piece_tokens: tokens of prompts that one step reads at most.
        """
        model.set_attn_implementation(LANES)
        fuse(model, bank)
        self._model = model
        self._tokens = TokenBytes(tokenizer)
        self._bank = bank
        self._max_rows = max_rows
        self._context = context
        self._cache_tokens = max_rows * context if cache_tokens is None else max(cache_tokens, context)
        self._piece_tokens = piece_tokens
        self._end_tokens = end_tokens(model, tokenizer)
        self._like = next(p for p in model.parameters() if p.is_floating_point()).new_empty(0)
        self._shape = StateShape.of(model.config)
        self._lanes: dict[int, tuple[Lane, list[_Answer]]] = {}  # by capacity
        self._prompts: list[_Answer] = []  # read in this order
        self._composition: Composition | None = None

    @property
    def free_rows(self) -> int:
        """How many answers may join now."""
        return self._max_rows - len(self._decoding) - len(self._prompts)

    @property
    def running(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._prompts) or bool(self._decoding)

    @property
    def generations(self) -> list[Generation]:
        """The answers being generated."""
        return [answer.generation for answer in self._decoding + self._prompts]

    @property
    def cache_tokens_in_use(self) -> int:
        """Tokens whose memory is taken or promised."""
        return sum(map(self._room, self._holding))

    @property
    def _decoding(self) -> list[_Answer]:
        return [answer for _, answers in self._lanes.values() for answer in answers]

    @property
    def _holding(self) -> list[_Answer]:
        """Those that have states."""
        return [answer for answer in self._decoding + self._prompts if answer.known]

    def join(self, generations: Sequence[Generation]) -> None:
        """Let answers (at most `free_rows`) join the batch; their prompts are read in the next steps.

        One that cannot be begun, since its adapter is not resident, say, ends with its exception.
        """
        if len(generations) > self.free_rows:
            raise ValueError(f"{len(generations)} answers cannot join, {self.free_rows} rows are free")
        for generation in generations:
            try:
                if generation.adapter is not None and generation.row is None:
                    generation.row = self._bank.row(generation.adapter)
                vocabulary = self._model.config.get_text_config().vocab_size
                self._prompts.append(_Answer(generation, generation.row, self._tokens, vocabulary))
            except Exception as error:
                generation.emit(error)

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one token for every decoding answer, and read pieces of prompts.

        A failure ends the answers whose prompts it read, which are new in it; without any, all of them.
        """
        self._drop([answer for answer in self._decoding + self._prompts if answer.generation.cancelled])
        self._make_room()
        step = _Step(self._decoding, list(self._next_pieces()))
        if not step.answers:
            return
        try:
            logits = self._forward(step)
        except Exception as error:
            failed = [answer for answer, _ in step.reading] or step.decoding
            self._drop(failed)
            for answer in failed:
                answer.generation.emit(error)
            return
        choosing = step.choosing
        for answer, (_, stop) in zip(step.answers, step.pieces, strict=True):
            answer.known = stop
        self._drop(self._advance(choosing, logits))
        self._into_lanes([answer for answer in choosing if answer in self._prompts])
        if not self.running:
            self._composition = None  # it holds the rows of adapters that may be gone from the bank

    @torch.inference_mode()
    def rehearse(self, rows: Sequence[Sequence[int]], *, decoded: int, piece: int) -> list[Tensor]:
        """Run given tokens as answers are run, each row joining a step after the one before; for an idle batch.

        Args:
            rows: tokens of prompts, and behind them those that take the place of chosen ones.
            decoded: how many of each row's these are.
            piece: tokens of a prompt that its first step reads; the second reads the rest.

        Returns:
            the logits that tokens would have been chosen by, ``(1 + decoded, vocabulary)`` for each row.
        """
        found: dict[_Answer, list[Tensor]] = {}
        waiting = list(rows)
        try:
            while waiting or self.running:
                if waiting:
                    found[self._rehearsed(waiting.pop(0), decoded)] = []
                step = _Step(
                    self._decoding,
                    [
                        (answer, len(answer.tokens) if answer.known else min(piece, len(answer.tokens)))
                        for answer in self._prompts
                    ],
                )
                logits = self._forward(step)
                for answer, (_, stop) in zip(step.answers, step.pieces, strict=True):
                    answer.known = stop
                choosing = step.choosing
                for answer, row in zip(choosing, logits, strict=True):
                    found[answer].append(row)
                    answer.tokens += answer.generation.prompt[answer.known : answer.known + 1]
                self._drop([answer for answer in choosing if answer.known == len(answer.tokens)])
                self._into_lanes([answer for answer in choosing if answer in self._prompts])
        finally:
            self.clear()
        return [torch.stack(logits) for logits in found.values()]

    def _rehearsed(self, tokens: Sequence[int], decoded: int) -> _Answer:
        generation = Generation(list(tokens), None, decoded, Sampling(), emit=lambda _: None)
        answer = _Answer(generation, None, self._tokens, self._model.config.get_text_config().vocab_size)
        answer.tokens = answer.tokens[: len(tokens) - decoded]
        answer.states = self._shape.room(capacity=len(answer.tokens), like=self._like)
        self._prompts.append(answer)
        return answer

    def clear(self) -> None:
        """Forget all answers, without a word to them, and whatever a step that broke off has left of them."""
        self._lanes.clear()
        self._prompts.clear()
        self._composition = None

    def _next_pieces(self) -> Iterator[tuple[_Answer, int]]:
        """Prompts to go on with in the next step, each up to a token; those that find no memory wait."""
        left = self._piece_tokens
        used = self.cache_tokens_in_use
        for answer in self._prompts:
            if not answer.known:
                used += self._room(answer)
                if used > self._cache_tokens:
                    break
                answer.states = self._shape.room(capacity=len(answer.tokens), like=self._like)
            count = min(left, len(answer.tokens) - answer.known)
            yield answer, answer.known + count
            left -= count
            if not left:
                break

    def _room(self, answer: _Answer) -> int:
        """Tokens of the lane that the answer is in, or will be: that of a prompt has room for the answer's first."""
        reading = not answer.known or answer.states is not None
        return lane_capacity(min(len(answer.tokens) + reading, self._context), self._context)

    def _make_room(self) -> None:
        """Move answers that fill their lane into a longer one; where memory is short, the youngest start over."""
        for capacity, (lane, answers) in list(self._lanes.items()):
            for answer in [answer for answer in answers if answer.known == capacity]:
                while self.cache_tokens_in_use > self._cache_tokens and len(self._holding) > 1:
                    self._start_over(self._holding[-1])
                if answer not in answers:
                    continue
                states = lane.read(answers.index(answer), answer.known).clone()
                self._leave_lane(answer)
                self._append(answer, states)

    def _start_over(self, answer: _Answer) -> None:
        """Give up an answer's states; they are computed again when there is memory."""
        self._drop([answer])
        answer.known, answer.states = 0, None
        self._prompts.insert(0, answer)

    def _forward(self, step: _Step) -> Tensor:
        """Logits of the tokens after which one is to be chosen, ``(answers, vocabulary)``."""
        device = self._like.device
        pieces = step.pieces
        lengths = [stop - start for start, stop in pieces]
        ids = [token for answer, (a, b) in zip(step.answers, pieces, strict=True) for token in answer.tokens[a:b]]
        positions = [position for piece in pieces for position in range(*piece)]
        last = list(accumulate(lengths))
        choosing = set(map(id, step.choosing))
        kept = [end - 1 for answer, end in zip(step.answers, last, strict=True) if id(answer) in choosing]
        composition = self._compose(step, lengths)
        with self._bank.running(composition, self._of_outputs(step, composition)):
            out: Any = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device),
                use_cache=False,
                plan=self._plan(step),
            )
        logits: Tensor = out.logits[0]
        return logits

    def _compose(self, step: _Step, lengths: list[int]) -> Composition:
        """The batch's rows side by side: as they were, unless the answers are others than in the step before."""
        rows = tuple(answer.adapter for answer in step.answers)
        if self._composition is None or self._composition.rows != rows:
            self._composition = self._bank.compose(rows)
        return self._composition.spread(lengths)

    def _of_outputs(self, step: _Step, composition: Composition) -> Composition:
        choosing = step.choosing
        if len(choosing) == composition.size or not self._bank.adapts_outputs(composition):
            return composition
        return self._bank.compose([answer.adapter for answer in choosing]).spread([1] * len(choosing))

    def _plan(self, step: _Step) -> Plan:
        parts: list[Decoding | Reading] = []
        at = 0
        for lane, answers in self._lanes.values():
            if answers:
                positions = [answer.known for answer in answers]
                parts.append(Decoding.of(lane, positions, start=at, device=self._like.device))
                at += len(answers)
        for answer, stop in step.reading:
            assert answer.states is not None  # noqa: S101 # made when its reading began
            parts.append(Reading.of(answer.states, answer.known, stop, at=at))
            at += stop - answer.known
        return Plan(tuple(parts))

    def _advance(self, answers: Sequence[_Answer], logits: Tensor) -> list[_Answer]:
        """Choose and emit a token for each; returns those that are finished, or failed by themselves."""
        done = []
        results = sample(logits, [answer.sampler for answer in answers])
        for answer, result in zip(answers, results, strict=True):
            if isinstance(result, Exception):
                answer.generation.emit(result)
                done.append(answer)
                continue
            try:
                if answer.advance(result, self._end_tokens):
                    done.append(answer)
            except Exception as error:  # one answer's failure is its own
                answer.generation.emit(error)
                done.append(answer)
        return done

    def _into_lanes(self, answers: Sequence[_Answer]) -> None:
        """Let answers whose prompts are read begin to decode."""
        for answer in answers:
            assert answer.states is not None  # noqa: S101 # it has just been read
            self._prompts.remove(answer)
            states, answer.states = answer.states, None
            self._append(answer, states)

    def _append(self, answer: _Answer, states: Tensor) -> None:
        capacity = self._room(answer)
        if capacity not in self._lanes:
            self._lanes[capacity] = (Lane(self._shape, capacity, self._like), [])
        lane, answers = self._lanes[capacity]
        if lane.full:  # before it takes more memory, that of empty ones is given back
            self._lanes = {size: found for size, found in self._lanes.items() if found[1] or found[0] is lane}
        lane.append(states)
        answers.append(answer)

    def _drop(self, gone: Sequence[_Answer]) -> None:
        for answer in gone:
            if answer in self._prompts:
                self._prompts.remove(answer)
            else:
                self._leave_lane(answer)

    def _leave_lane(self, answer: _Answer) -> None:
        """Take an answer out of its lane; the last one takes its place."""
        lane, answers = next(found for found in self._lanes.values() if answer in found[1])
        row = answers.index(answer)
        lane.remove(row, answer.known, answers[-1].known)
        answers[row] = answers[-1]
        answers.pop()


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Tokens that end an answer, by the generation config and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*tokens, tokenizer.eos_token_id) if token is not None)


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a model whose cache is not plain keys and values per position.

    Raises:
        SpecError: it has sliding windows or recurrent states.
    """
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if kinds - {"DynamicLayer"}:
        raise SpecError(
            f"The base model's cache has layers of the kinds {sorted(kinds)}; this engine serves models whose "
            "attention sees the whole context (DynamicLayer). Choose such a base model.",
            code="base_model_not_servable",
            param="base_model",
        )
