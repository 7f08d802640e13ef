"""Generation with continuous batching: requests of any adapters join and leave the running batch between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from uora.errors import SpecError
from uora.serving.bank import AdapterBank
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
    """

    prompt: Sequence[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling
    emit: Callable[[Delta | Exception], None]
    project: str = ""
    deadline: float | None = None
    cancelled: bool = False
    generated: list[int] = field(default_factory=list)


class _Row:
    """A sequence in the running batch."""

    def __init__(self, sequence: Generation, tokens: TokenBytes, vocabulary: int) -> None:
        self.sequence = sequence
        self.text = TextStream(tokens, sequence.sampling.stop)
        self.sampler = Sampler(sequence.sampling, vocabulary=vocabulary)

    def advance(self, sampled: Sampled, end_tokens: frozenset[int]) -> bool:
        """Emit what a token adds to the answer; returns whether the answer is finished."""
        sequence = self.sequence
        sequence.generated.append(sampled.token)
        ended = sampled.token in end_tokens
        pieces = [] if ended else [self.text.feed(sampled)]
        reason: FinishReason | None = None
        if ended or self.text.stopped or self.sampler.finished:
            reason = "stop"
        elif len(sequence.generated) >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            pieces.append(self.text.flush())
        text = "".join(piece.text for piece in pieces)
        logprobs = tuple(logprob for piece in pieces for logprob in piece.logprobs)
        if self.text.stopped:
            reason = "stop"
        if text or logprobs or reason:
            sequence.emit(Delta(text, reason, len(sequence.generated), logprobs))
        return reason is not None


class Batcher:
    """The running batch. One thread calls `step`; it alone touches the model and the bank.

    Rows are padded on the left to a common length, so that all of them end at the same position of the cache.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, bank: AdapterBank, *, max_rows: int
    ) -> None:
        self._model = model
        self._tokens = TokenBytes(tokenizer)
        self._bank = bank
        self._max_rows = max_rows
        self._end_tokens = end_tokens(model, tokenizer)
        self._rows: list[_Row] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0)  # (rows, positions), 1 where a row has a token
        self._next = torch.empty(0)  # (rows, 1), the tokens to run next

    @property
    def free_rows(self) -> int:
        """How many sequences may join now."""
        return self._max_rows - len(self._rows)

    @property
    def running(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._rows)

    @property
    def generations(self) -> list[Generation]:
        """The answers being generated."""
        return [row.sequence for row in self._rows]

    @torch.inference_mode()
    def join(self, sequences: Sequence[Generation]) -> None:
        """Run the prompts of ``sequences`` (at most `free_rows`) and let them join the batch.

        A failure ends these sequences with its exception and leaves the running ones untouched.
        """
        if len(sequences) > self.free_rows:
            raise ValueError(f"{len(sequences)} sequences cannot join, {self.free_rows} rows are free")
        try:
            rows = [_Row(s, self._tokens, self._model.config.vocab_size) for s in sequences]
            ids, mask = self._pad([list(s.prompt) for s in sequences])
            cache = DynamicCache(config=self._model.config)
            logits = self._forward(rows, ids, mask, cache)
        except Exception as error:
            for sequence in sequences:
                sequence.emit(error)
            return
        self._merge(rows, cache, mask)
        self._advance(logits, first=len(self._rows) - len(rows))

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one token for every running sequence. A failure ends all of them with its exception."""
        self._keep([i for i, row in enumerate(self._rows) if not row.sequence.cancelled])
        if not self._rows:
            return
        try:
            self._mask = F.pad(self._mask, (0, 1), value=1)
            logits = self._forward(self._rows, self._next, self._mask, self._cache)
        except Exception as error:
            failed, self._rows, self._cache = self._rows, [], None
            for row in failed:
                row.sequence.emit(error)
            return
        self._advance(logits, first=0)

    def _pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(prompt) for prompt in prompts)
        device = self._model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        return ids, mask

    def _forward(self, rows: list[_Row], ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """Logits of the last position, ``(rows, vocabulary)``."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._bank.serving([row.sequence.adapter for row in rows]):
            out: Any = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _merge(self, rows: list[_Row], cache: DynamicCache, mask: Tensor) -> None:
        """Append prefilled rows to the batch, padding the shorter side on the left."""
        if self._cache is None or not self._rows:
            self._rows, self._cache, self._mask = list(rows), cache, mask
            self._next = torch.zeros(len(rows), 1, dtype=torch.long, device=mask.device)
            return
        length = max(self._mask.shape[1], mask.shape[1])
        for old, new in zip(_layers(self._cache), _layers(cache), strict=True):
            old.keys = torch.cat([_left_pad(old.keys, length), _left_pad(new.keys, length)])
            old.values = torch.cat([_left_pad(old.values, length), _left_pad(new.values, length)])
        self._mask = torch.cat([F.pad(m, (length - m.shape[1], 0)) for m in (self._mask, mask)])
        self._next = F.pad(self._next, (0, 0, 0, len(rows)))
        self._rows = self._rows + list(rows)

    def _advance(self, logits: Tensor, *, first: int) -> None:
        """Choose tokens for the rows from ``first`` on, and drop those that are finished."""
        unfinished = list(range(first))
        results = sample(logits, [row.sampler for row in self._rows[first:]])
        for index, (row, result) in enumerate(zip(self._rows[first:], results, strict=True)):
            if isinstance(result, Exception):  # one row's failure is its own
                row.sequence.emit(result)
            elif not row.advance(result, self._end_tokens):
                self._next[first + index, 0] = row.sequence.generated[-1]
                unfinished.append(first + index)
        self._keep(unfinished)

    def _keep(self, indices: list[int]) -> None:
        """Keep these rows only, and drop positions that none of them needs any more."""
        if len(indices) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in indices]
        if not self._rows or self._cache is None:
            self._cache = None
            return
        chosen = torch.tensor(indices, device=self._mask.device)
        self._mask, self._next = self._mask[chosen], self._next[chosen]
        unused = int((self._mask.sum(0) > 0).int().argmax())  # leading positions that are padding in every row
        self._mask = self._mask[:, unused:]
        for layer in _layers(self._cache):
            layer.keys = layer.keys[chosen, :, unused:]
            layer.values = layer.values[chosen, :, unused:]


def _layers(cache: DynamicCache) -> list[Any]:
    """Layers with ``keys`` and ``values`` of ``(rows, heads, positions, size)``, as `check_servable` made sure."""
    return list(cache.layers)


def _left_pad(states: Tensor, length: int) -> Tensor:
    """Pad ``(rows, heads, positions, size)`` with zeros in front; the mask hides them."""
    return F.pad(states, (0, 0, length - states.shape[2], 0))


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
            "attention sees the whole context (DynamicLayer)."
        )
