"""Keys and values of running answers, and the attention over them.

Answers that decode lie in *lanes*: one tensor for all rows of about the same length, so that a step's attention is one
operation per lane and layer, over memory that is nowhere copied or padded to the longest answer of the batch. A prompt
that is being read has a tensor of its own, which is copied into its lane when it is complete.

Everything else in a model treats every token by itself. So a step's tokens go through it end to end, as one row: the
next token of every decoding answer, then pieces of prompts. The attention alone has to know which token is whose; the
model is told as the keyword argument ``plan``, which transformers hands down to the attention function registered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

#: Name under which transformers knows `lane_attention`.
LANES = "uora_lanes"
#: Tokens of the shortest lane; each further one is four times as long.
_SHORTEST_LANE = 256


@dataclass(frozen=True)
class StateShape:
    """What a token leaves in the cache: ``layers`` times a key and a value of ``(heads, size)``."""

    layers: int
    heads: int
    size: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> StateShape:
        """Of a causal model's configuration."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, size)

    def room(self, *rows: int, capacity: int, like: Tensor) -> Tensor:
        """Zeros for ``capacity`` tokens, ``(layers, 2, *rows, heads, capacity, size)``."""
        return like.new_zeros(self.layers, 2, *rows, self.heads, capacity, self.size)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Memory of one token."""
        return 2 * self.layers * self.heads * self.size * dtype.itemsize


def lane_capacity(tokens: int, context: int) -> int:
    """Tokens of the shortest lane with room for ``tokens``; none is longer than ``context``."""
    capacity = _SHORTEST_LANE
    while capacity < tokens:
        capacity *= 4
    return min(capacity, context)


class Lane:
    """States of ``rows`` answers, the first of the tensor's rows; it grows, keeps no gaps, and its memory when it
    empties: to be given zeroed pages by the operating system anew takes as long as several steps.

    Where no answer has a token there are zeros. The attention gives such places the weight 0, but 0 times what a
    failed answer has left there, NaN perhaps, would be NaN.
    """

    def __init__(self, shape: StateShape, capacity: int, like: Tensor) -> None:
        self.capacity = capacity
        self.rows = 0
        self._shape = shape
        self._like = like
        self.states = shape.room(0, capacity=capacity, like=like)

    @property
    def full(self) -> bool:
        """Whether the next answer needs more memory."""
        return self.rows == self.states.shape[2]

    def append(self, states: Tensor) -> None:
        """Add an answer with the states ``(layers, 2, heads, tokens, size)``."""
        if self.full:
            grown = self._shape.room(max(2 * self.rows, 1), capacity=self.capacity, like=self._like)
            grown[:, :, : self.rows] = self.states
            self.states = grown
        self.states[:, :, self.rows, :, : states.shape[3]] = states
        self.rows += 1

    def read(self, row: int, tokens: int) -> Tensor:
        """States of an answer, ``(layers, 2, heads, tokens, size)``, not copied."""
        return self.states[:, :, row, :, :tokens]

    def remove(self, row: int, tokens: int, last_tokens: int) -> None:
        """Take an answer with ``tokens`` out; the last one, which has ``last_tokens``, moves into its place."""
        self.rows -= 1
        written = max(tokens, last_tokens) + 1  # a step that failed has written one more
        last = self.read(self.rows, written)
        if row != self.rows:
            self.states[:, :, row, :, :written] = last
        last.zero_()


@dataclass(frozen=True)
class Decoding:
    """The next tokens of all answers of a lane, which stand at the step's tokens ``tokens``."""

    tokens: slice
    states: Tensor  # (layers, 2, rows or more, heads, capacity, size)
    positions: Tensor  # (rows,)
    rows: Tensor  # (rows,), 0, 1, ...
    mask: Tensor  # (rows, 1, 1, limit), true where a row has a token

    @classmethod
    def of(cls, lane: Lane, positions: Sequence[int], *, start: int, device: torch.device) -> Decoding:
        """Of a lane whose answers go on at ``positions``, from the step's token ``start`` on."""
        rows = torch.arange(len(positions), device=device)
        at = torch.tensor(positions, device=device)
        mask = torch.arange(max(positions) + 1, device=device) <= at[:, None]
        return cls(slice(start, start + len(positions)), lane.states, at, rows, mask[:, None, None])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """``(rows, heads, size)`` of queries, keys and values of that shape."""
        keys, values = self.states[layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        n, limit = len(self.rows), self.mask.shape[-1]
        # Query heads that share a key head as so many queries: torch's own way copies the keys for each of them.
        grouped = q.view(n, keys.shape[1], -1, q.shape[-1])
        found = F.scaled_dot_product_attention(
            grouped, keys[:n, :, :limit], values[:n, :, :limit], attn_mask=self.mask, scale=scaling
        )
        return found.reshape(n, -1, q.shape[-1])


@dataclass(frozen=True)
class Reading:
    """A piece of a prompt: its tokens ``start`` to ``stop``, which stand at the step's tokens ``tokens``."""

    tokens: slice
    states: Tensor  # (layers, 2, heads, capacity, size)
    start: int
    stop: int
    mask: Tensor  # (tokens, stop), causal

    @classmethod
    def of(cls, states: Tensor, start: int, stop: int, *, at: int) -> Reading:
        """A piece that begins at the step's token ``at``."""
        positions = torch.arange(stop, device=states.device)
        mask = positions <= positions[start:, None]
        return cls(slice(at, at + stop - start), states, start, stop, mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """``(tokens, heads, size)`` of queries, keys and values of that shape."""
        keys, values = self.states[layer]
        keys[:, self.start : self.stop] = k.transpose(0, 1)
        values[:, self.start : self.stop] = v.transpose(0, 1)
        n, heads, size = q.shape
        shared = heads // keys.shape[0]
        grouped = q.view(n, -1, shared, size).permute(1, 2, 0, 3).reshape(1, -1, shared * n, size)
        mask = self.mask.repeat(shared, 1)
        found = F.scaled_dot_product_attention(
            grouped, keys[None, :, : self.stop], values[None, :, : self.stop], attn_mask=mask, scale=scaling
        )
        return found.view(-1, shared, n, size).permute(2, 0, 1, 3).reshape(n, heads, size)


@dataclass(frozen=True)
class Plan:
    """Which token of a step is whose."""

    parts: tuple[Decoding | Reading, ...]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """``(tokens, heads, size)`` of all the step's queries, keys and values; the states are written."""
        found = [part.attend(layer, q[part.tokens], k[part.tokens], v[part.tokens], scaling) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found)


def lane_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    plan: Plan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a step (transformers' attention interface).

    Args:
        module: knows its layer.
        query: ``(1, heads, tokens, size)``.
        key: ``(1, key heads, tokens, size)``.
        value: as ``key``.
        attention_mask: None; the plan says it all.
        scaling: of the scores.
        plan: which token is whose.
        sliding_window: not supported.
        softcap: not supported.
        s_aux: attention sinks, not supported.

    Returns:
        ``(1, tokens, heads, size)``, and None for the weights.

    Raises:
        ValueError: without a plan, or with what is not supported.
    """
    if plan is None or attention_mask is not None:
        raise ValueError("attention over lanes needs a plan, and takes no mask")
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ValueError("attention over lanes has no sliding window, softcap or attention sinks")
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return plan.attend(layer, q, k, v, scaling).unsqueeze(0), None


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """The plan says who sees whom."""


AttentionInterface.register(LANES, lane_attention)
AttentionMaskInterface.register(LANES, _no_mask)
