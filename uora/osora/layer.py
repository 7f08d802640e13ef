"""OSoRA on one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uora.svd import Factors, osora_update
from uora.tuner.additive import AdditiveLinear
from uora.tuner.pairs import Pair


class OsoraLinear(AdditiveLinear):
    """A linear layer with OSoRA adapters: o ``(out,)`` and s ``(r,)`` are trained, nothing else is stored."""

    adapter_layer_names = ("osora_o", "osora_s")
    other_param_names = ("dropout", "factors")

    osora_o: nn.ParameterDict
    osora_s: nn.ParameterDict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Of this layer's base weight; adapters of one rank share them.
        self.factors: dict[str, Factors] = {}

    @torch.no_grad()
    def start(self, adapter_name: str, factors: Factors) -> None:
        """Let an adapter start as no update, at the singular values of the base weight."""
        self.factors[adapter_name] = factors
        self.osora_s[adapter_name].copy_(factors.s)

    def update(self, x: Tensor, adapter_name: str) -> Tensor:
        """``o * (U (s * (V x))) - U (S * (V x))``."""
        factors, o, s = self.factors[adapter_name], self.osora_o[adapter_name], self.osora_s[adapter_name]
        return osora_update(x, factors, o, s)

    def pair(self, adapter_name: str, *, like: Tensor) -> Pair:
        """V, and ``(diag(o) U diag(s) - U diag(S))^T``."""
        factors, o, s = self.factors[adapter_name], self.osora_o[adapter_name], self.osora_s[adapter_name]
        exact = factors.like(s)
        change = s[:, None] * (o - 1) + (s - exact.s)[:, None]  # of each element of U^T, from small numbers
        return Pair(factors.like(like).v, (change * exact.u.T).to(like.dtype))

    def mixed_update(self, x: Tensor, group: Factors, adapter_names: Sequence[str]) -> Tensor:
        """The same with each row's own o and s."""
        o, s = (torch.stack([vectors[name] for name in adapter_names]) for vectors in (self.osora_o, self.osora_s))
        return osora_update(x, group, o, s)

    def group_of(self, adapter_name: str) -> Factors:
        """Rows over the same factors share the products with them."""
        return self.factors[adapter_name]

    def delta_weight(self, adapter_name: str) -> Tensor:
        """``diag(o) U diag(s) V - U diag(S) V``, in float32."""
        o, s = (vectors[adapter_name].detach().float() for vectors in (self.osora_o, self.osora_s))
        f = self.factors[adapter_name].like(o)
        change: Tensor = o.unsqueeze(-1) * f.u * s - f.u * f.s  # (out, r)
        return change @ f.v

    def __repr__(self) -> str:
        return "osora." + super().__repr__()
