"""Rows of a batch end to end through a causal model: no padding, and what all rows begin with goes through once.

A batch of conversations mostly begins with the same tokens: the template's opening, the system message. In a causal
model the hidden states of these tokens do not depend on what follows, so they are the same for every row and are
computed once; the rows attend to them, and their gradients add up there. The packed sequence of one *group* is::

    shared prefix | rest of row 0 | rest of row 1 | ...

Attention is the one place where tokens of different rows meet, so it alone has to know the layout: the model is told it
as the keyword argument ``packed``, which transformers hands down to the attention function registered here. Everything
else (linear layers, norms, position-wise networks) is the same for a token wherever it stands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from uora.comparing import KERNEL_TOLERANCES, relative_difference, tokens_to_try
from uora.data import IGNORED, Example
from uora.training.batches import Piece

logger = logging.getLogger(__name__)

#: Name under which transformers knows `packed_attention`.
PACKED_ATTENTION = "uora_packed"
#: Keys up to which attention on a CPU is faster with its scores written out than with torch's fused kernel, whose
#: backward pass is slow there (measured on 8 rows of 64 tokens: 1.4 s for a step against 1.8 s).
_MAX_KEYS_WRITTEN_OUT = 512


@dataclass(frozen=True)
class Group:
    """Rows that share a prefix of ``prefix`` tokens, 0 for none; ``lengths`` are the tokens of each row after it."""

    prefix: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the packed sequence."""
        return self.prefix + sum(self.lengths)


@dataclass(frozen=True)
class Packed:
    """Layout of a packed sequence: its groups, one after the other."""

    groups: tuple[Group, ...]

    def slices(self) -> Iterator[tuple[Group, slice]]:
        """Each group with its place in the sequence."""
        ends = accumulate((group.tokens for group in self.groups), initial=0)
        for group, (start, end) in zip(self.groups, pairwise(ends), strict=True):
            yield group, slice(start, end)


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all rows begin with, at most up to the token before the first that any row learns.

    So every row keeps the position that predicts its first learned token. 0 for a single row.
    """
    if len(examples) < 2:
        return 0
    first = examples[0].input_ids
    longest = min(_unlearned(example) for example in examples) - 1
    for position in range(longest):
        if any(example.input_ids[position] != first[position] for example in examples):
            return position
    return max(longest, 0)


def _unlearned(example: Example) -> int:
    """Tokens before the first learned one; a row without any counts whole."""
    # The first token has nothing before it to be predicted from, so its label does not count.
    labels = example.labels[1:]
    return next((i for i, label in enumerate(labels, start=1) if label != IGNORED), len(labels) + 1)


@dataclass(frozen=True)
class Packer:
    """How rows go through a model that takes them packed; ``share_prefix``: their common beginning only once."""

    share_prefix: bool

    def pieces(self, examples: Sequence[Example], *, max_tokens: int) -> Iterator[Piece]:
        """Packed sequences of at most ``max_tokens`` tokens, or of one longer row, in the order of the rows."""
        for part in self.parts(examples, max_tokens=max_tokens):
            yield pack([part], share_prefix=self.share_prefix)

    def parts(self, examples: Sequence[Example], *, max_tokens: int) -> Iterator[Sequence[Example]]:
        """The rows of each of these sequences."""
        start = 0
        for stop in range(1, len(examples) + 1):
            if stop < len(examples) and self.tokens(examples[start : stop + 1]) <= max_tokens:
                continue
            yield examples[start:stop]
            start = stop

    def tokens(self, examples: Sequence[Example]) -> int:
        """Tokens of the rows packed."""
        saved = (len(examples) - 1) * shared_prefix(examples) if self.share_prefix else 0
        return sum(len(example.input_ids) for example in examples) - saved


def make_packer(model: PreTrainedModel) -> Packer | None:
    """Have a causal model take packed rows; None, and the model as it was, if it cannot be told where its rows are.

    That is tried on two rows that begin alike: packed, each must have the logits that it has alone, whichever of them
    comes first. Where the model has dropout, tokens of different rows are not the same even in a common beginning, so
    it is not shared.
    """
    rows = _rows_to_try(model.config.get_text_config().vocab_size)
    with torch.no_grad(), _evaluating(model):
        alone = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in rows]
        previous = model.config._attn_implementation
        try:
            model.set_attn_implementation(PACKED_ATTENTION)
            packed = _logits_of_packed(model, rows)
            turned = _logits_of_packed(model, rows[::-1])[::-1]
        except _REFUSALS as error:
            logger.warning("rows are padded, not packed: %s refuses a layout (%s)", type(model).__name__, error)
        else:
            close = relative_difference(packed, alone) < KERNEL_TOLERANCES[model.dtype]
            if close and relative_difference(packed, turned) < _ROUNDING:
                return Packer(share_prefix=not _has_dropout(model))
            logger.warning("rows are padded, not packed: %s mixes them", type(model).__name__)
        model.set_attn_implementation(previous)
    return None


#: What models raise that have no place for the layout.
_REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError)
#: Share of the logits by which the same computation in another order may differ.
_ROUNDING = 0.01


def _rows_to_try(vocabulary: int) -> list[list[int]]:
    ids = tokens_to_try(vocabulary, 14)
    return [ids[:9], ids[:4] + ids[9:]]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _logits_of_packed(model: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    """Of each row, ``(tokens, vocabulary)``, packed with a shared prefix."""
    packed = pack([[Example(ids, [IGNORED] * (len(ids) - 1) + ids[-1:]) for ids in rows]], share_prefix=True)
    (group,) = packed["packed"].groups
    tokens = {name: packed[name].to(model.device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**tokens, packed=packed["packed"]).logits[0]
    ends = accumulate(group.lengths, initial=group.prefix)
    return [torch.cat([logits[: group.prefix], logits[start:end]]) for start, end in pairwise(ends)]


def _has_dropout(model: PreTrainedModel) -> bool:
    in_modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return in_modules or bool(getattr(model.config, "attention_dropout", 0.0))


def pack(groups: Sequence[Sequence[Example]], *, share_prefix: bool) -> Piece:
    """One packed sequence of groups of rows.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each ``(1, tokens)``, and ``packed``, the layout.
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    layout = []
    for examples in groups:
        prefix = shared_prefix(examples) if share_prefix else 0
        ids += examples[0].input_ids[:prefix]
        positions += range(prefix)
        labels += [IGNORED] * prefix
        for example in examples:
            ids += example.input_ids[prefix:]
            positions += range(prefix, len(example.input_ids))
            labels += [IGNORED, *example.labels[prefix + 1 :]]
        layout.append(Group(prefix, tuple(len(example.input_ids) - prefix for example in examples)))
    tensors = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values]) for name, values in tensors.items()} | {"packed": Packed(tuple(layout))}


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Packed | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed sequence (transformers' attention interface).

    Args:
        query: ``(1, heads, tokens, size)``.
        key: ``(1, key heads, tokens, size)``.
        value: as ``key``.
        attention_mask: None; the layout says it all.
        scaling: of the scores.
        packed: the layout.
        dropout: of the attention's weights.
        sliding_window: positions that a token looks back, itself included; None for all.
        softcap: not supported.
        s_aux: attention sinks, not supported.

    Returns:
        ``(1, tokens, heads, size)``, and None for the weights.

    Raises:
        ValueError: without a layout, or with what is not supported.
    """
    if packed is None or attention_mask is not None or softcap is not None or s_aux is not None:
        raise ValueError("packed attention needs a layout, and takes no mask, softcap or attention sinks")
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))  # (tokens, heads, size)
    options = _Options(scaling, dropout, sliding_window)
    rows = [_group_attention(q[place], k[place], v[place], group, options) for group, place in _blocks(packed)]
    return torch.cat(rows).unsqueeze(0), None


def _blocks(packed: Packed) -> Iterator[tuple[Group, slice]]:
    """Groups and their places; neighbours without a prefix are taken together."""
    lengths: list[int] = []
    start = end = 0
    for group, place in packed.slices():
        if group.prefix:
            if lengths:
                yield Group(0, tuple(lengths)), slice(start, end)
            yield group, place
            lengths, start = [], place.stop
        else:
            lengths += group.lengths
        end = place.stop
    if lengths:
        yield Group(0, tuple(lengths)), slice(start, end)


@dataclass(frozen=True)
class _Options:
    scaling: float
    dropout: float
    sliding_window: int | None


def _group_attention(q: Tensor, k: Tensor, v: Tensor, group: Group, options: _Options) -> Tensor:
    """``(tokens, heads, size)`` of one group."""
    (q0, q1), (k0, k1), (v0, v1) = ((part[: group.prefix], part[group.prefix :]) for part in (q, k, v))
    queries = _padded(q1, group.lengths)
    keys, values = (_after(first, _padded(own, group.lengths)) for first, own in ((k0, k1), (v0, v1)))
    own = _attend(queries, keys, values, options)  # (rows, longest, heads, size)
    found = torch.cat([row[:length] for row, length in zip(own.unbind(), group.lengths, strict=True)])
    if not group.prefix:
        return found
    first = _attend(q0.unsqueeze(0), k0.unsqueeze(0), v0.unsqueeze(0), options).squeeze(0)
    return torch.cat([first, found])


def _padded(states: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """``(tokens, heads, size)`` to ``(rows, longest, heads, size)``, zeros behind the shorter rows."""
    if len(lengths) == 1:
        return states.unsqueeze(0)
    ends = accumulate(lengths, initial=0)
    return pad_sequence([states[start:end] for start, end in pairwise(ends)], batch_first=True)


def _after(prefix: Tensor, own: Tensor) -> Tensor:
    """Every row's own states with those of the prefix before them."""
    if not len(prefix):
        return own
    return torch.cat([prefix.expand(len(own), *prefix.shape), own], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> Tensor:
    """Causal attention of rows: q ``(rows, n, heads, size)``, k and v ``(rows, p + n, key heads, size)``.

    Queries stand at the last n of the p + n positions. Padding is behind every row's own tokens, where none of them
    looks.
    """
    rows, n, heads, size = q.shape
    key_heads, seen = k.shape[2], k.shape[1]
    shared = heads // key_heads  # query heads that share a key head
    q = q.view(rows, n, key_heads, shared, size).permute(0, 2, 3, 1, 4)  # (rows, key heads, shared, n, size)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (rows, key heads, seen, size)
    mask = _mask(n, seen, options.sliding_window, q.device)
    if q.device.type == "cpu" and seen <= _MAX_KEYS_WRITTEN_OUT:
        scores = q.reshape(rows, key_heads, shared * n, size) @ (k * options.scaling).transpose(2, 3)
        scores = scores.view(rows, key_heads, shared, n, seen) + torch.zeros_like(mask, dtype=q.dtype).masked_fill_(
            ~mask, -torch.inf
        )
        weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), options.dropout)
        found = weights.view(rows, key_heads, shared * n, seen) @ v
        found = found.view(rows, key_heads, shared, n, size)
    else:
        found = F.scaled_dot_product_attention(
            q.flatten(1, 2),
            k.repeat_interleave(shared, dim=1),
            v.repeat_interleave(shared, dim=1),
            attn_mask=mask,
            dropout_p=options.dropout,
            scale=options.scaling,
        ).view(rows, key_heads, shared, n, size)
    return found.permute(0, 3, 1, 2, 4).reshape(rows, n, heads, size)


def _mask(n: int, seen: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """``(n, seen)``, True where a query looks."""
    mask = torch.ones(n, seen, dtype=torch.bool, device=device).tril_(seen - n)
    return mask if sliding_window is None else mask.triu_(seen - n - sliding_window + 1)


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask of packed attention (transformers' mask interface): the layout takes its place."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
