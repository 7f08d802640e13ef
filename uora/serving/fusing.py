"""Attention and feed-forward layers of well-known models with fewer, larger operations.

A step over few tokens is mostly the overhead of its operations. Layers that read the same input are one product here,
queries and keys are rotated together, and an adapter's product with its first frame is shared by the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uora.serving.bank import AdapterBank, BankedLinear
from uora.serving.composition import Modules
from uora.serving.lanes import Plan
from uora.serving.products import product

#: transformers' model types whose decoder layers are these.
FUSED_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def fuse(model: PreTrainedModel, bank: AdapterBank) -> bool:
    """Replace the attention and feed-forward layers of a model of one of `FUSED_TYPES`; whether it is one.

    Its linear layers keep their names, and stay where adapters look for them.
    """
    layers = getattr(cast(Any, model).get_decoder(), "layers", ()) if model.config.model_type in FUSED_TYPES else ()
    if not all(type(linear.base_layer) is nn.Linear for layer in layers for linear in _linears(layer)):
        return False  # quantised
    for layer in layers:
        layer.self_attn = FusedAttention(layer.self_attn, bank)
        layer.mlp = FusedFeedForward(layer.mlp, bank)
    return bool(layers)


def _linears(layer: Any) -> list[BankedLinear]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]


class _Joined:
    """Linear layers that read the same input, as one product."""

    def __init__(self, linears: Sequence[BankedLinear], bank: AdapterBank) -> None:
        layers = [cast(nn.Linear, linear.base_layer) for linear in linears]
        biases = [layer.bias for layer in layers]
        bias = None
        if any(b is not None for b in biases):
            zeros = [layer.weight.new_zeros(layer.weight.shape[0]) for layer in layers]
            bias = torch.cat([zero if b is None else b for b, zero in zip(biases, zeros, strict=True)]).detach()
        self._product = product(torch.cat([layer.weight for layer in layers]), bias)
        ends = accumulate((layer.weight.shape[0] for layer in layers), initial=0)
        names = [linear.name for linear in linears]
        self._modules = Modules({name: slice(*ends) for name, ends in zip(names, pairwise(ends), strict=True)})
        self._bank = bank

    def __call__(self, x: Tensor) -> Tensor:
        """All outputs side by side, ``(tokens, outs)``, of ``x (tokens, in)``."""
        out = self._product(x)
        self._bank.add(self._modules, x, out)
        return out


class FusedAttention(nn.Module):
    """Self-attention with rotary positions over grouped keys."""

    def __init__(self, attention: Any, bank: AdapterBank) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.layer_idx: int = attention.layer_idx
        self._size: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._heads = self.q_proj.base_layer.out_features // self._size
        self._key_heads = self.k_proj.base_layer.out_features // self._size
        # Keys last: adapters are mostly on queries and values, whose outputs then lie side by side.
        self._qvk = _Joined([self.q_proj, self.v_proj, self.k_proj], bank)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], plan: Plan, **_: Any
    ) -> tuple[Tensor, None]:
        """``(1, tokens, hidden)`` to the same, as transformers' own."""
        tokens = hidden_states.shape[1]
        states = self._qvk(hidden_states[0]).view(tokens, -1, self._size)
        q, v, k = torch.split(states, [self._heads, self._key_heads, self._key_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rotated = _rotate(torch.cat([q, k], dim=1), *position_embeddings)
        q, k = torch.split(rotated, [self._heads, self._key_heads], dim=1)
        found = plan.attend(self.layer_idx, q.contiguous(), k, v, self._scaling)
        return self.o_proj(found.reshape(1, tokens, -1)), None


class FusedFeedForward(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, mlp: Any, bank: AdapterBank) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self._gate_and_up = _Joined([self.gate_proj, self.up_proj], bank)

    def forward(self, x: Tensor) -> Tensor:
        """``(1, tokens, hidden)`` to the same."""
        gate, up = self._gate_and_up(x[0]).chunk(2, dim=-1)
        found: Tensor = self.down_proj(self.act_fn(gate).mul_(up).unsqueeze(0))
        return found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021) for ``x (tokens, heads, size)``; cos and sin ``(1, tokens, size)``."""
    cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
