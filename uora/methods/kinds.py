"""What each method has of its own in PEFT: its configuration, its start, and where its numbers are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig
from torch import Tensor

from uora import layout
from uora.delta import Family, frame_tensor
from uora.layout import pair_rank
from uora.osora import OsoraConfig
from uora.spec import AdapterSpec, LoraSpec, OloraSpec, OsoraSpec, UoraSpec, VeraSpec
from uora.svd import BaseWeights
from uora.tuner import UoraConfig
from uora.tuner._peft import BufferDict

#: An adapter's layers by their names in the base model. PEFT declares few of their attributes.
Layers = Mapping[str, Any]


class Method(Protocol):
    """What a method has of its own."""

    def config(self, base: BaseWeights) -> PeftConfig:
        """PEFT's configuration, without its targets."""

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        """What PEFT's injection leaves to do."""

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        """A layer's own numbers, by their names in ``uora.layout``."""


class _Uora:
    def __init__(self, spec: UoraSpec) -> None:
        self._spec = spec

    def config(self, base: BaseWeights) -> PeftConfig:
        return UoraConfig.of(self._spec, target_modules=None, frame_cache_dir=base.cache_dir)

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        pass

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"d": layer.uora_lambda_d[adapter_name], "b": layer.uora_lambda_b[adapter_name]}


class _Vera:
    def __init__(self, spec: VeraSpec) -> None:
        self._spec = spec

    def config(self, base: BaseWeights) -> PeftConfig:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")  # ours come from a seed
            return VeraConfig(
                r=self._spec.r,
                vera_dropout=self._spec.dropout,
                d_initial=self._spec.d_initial,
                save_projection=False,
            )

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        """Give every layer the matrices of its own size, in the place of slices of PEFT's largest."""
        family = Family(self._spec.frame_seed, self._spec.r, base.cache_dir, layout.VERA_INIT)
        for layer in layers.values():
            like = torch.empty(0, device=layer.vera_lambda_d[adapter_name].device)
            a = frame_tensor(family, "A", 0, layer.in_features, like=like)
            b_rows = frame_tensor(family, "B", 0, layer.out_features, like=like)
            layer.vera_A = _with(layer.vera_A, adapter_name, a)
            layer.vera_B = _with(layer.vera_B, adapter_name, b_rows.T)
        # PEFT's VeRA has no such hook, and would answer every row of a mixed batch with the active adapter.
        cast(Any, model.base_model)._enable_peft_forward_hooks = _refuse_mixed_batch

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"d": layer.vera_lambda_d[adapter_name], "b": layer.vera_lambda_b[adapter_name]}


@contextmanager
def _refuse_mixed_batch(*_args: Any, adapter_names: Sequence[str] | None = None, **_kwargs: Any) -> Iterator[None]:
    if adapter_names is not None:
        raise ValueError("PEFT's VeRA cannot mix adapters in a batch; serve them with uora.serving.bank.AdapterBank.")
    yield


def _with(shared: BufferDict, name: str, matrix: Tensor) -> BufferDict:
    return BufferDict({**{key: shared[key] for key in shared}, name: matrix}, persistent=False)


class _Lora:
    def __init__(self, spec: LoraSpec | OloraSpec) -> None:
        self._spec = spec
        self._rank = pair_rank(spec)

    def config(self, base: BaseWeights) -> PeftConfig:
        return LoraConfig(
            r=self._rank,
            lora_alpha=self._spec.lora_alpha * self._rank / self._spec.r,  # type: ignore[arg-type] # floats work
            lora_dropout=self._spec.dropout,
        )

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        pass

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"lora_a": layer.lora_A[adapter_name].weight, "lora_b": layer.lora_B[adapter_name].weight}


class _Olora(_Lora):
    """LoRA of twice the rank: the trained pair, and the initial one with B negated, which stays as it is.

    So the base model keeps its weights; PEFT's own OLoRA subtracts the initial pair from them, which rounds a bfloat16
    or quantised base anew.
    """

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        # Of this very model, rounded or quantised as it may be: both pairs are stored, so none is ever rebuilt.
        for name, weight in BaseWeights.of_model(model).weights(layers):
            a, b = self.parameters(layers[name], adapter_name).values()
            self._start(a, b, weight.to(a.device))
            self._freeze_initial(a, b)

    @torch.no_grad()
    def _start(self, a: Tensor, b: Tensor, weight: Tensor) -> None:
        """The first r columns of Q and rows of R, where ``W = Q R``; beyond the weight's own rank as LoRA starts."""
        r = self._spec.r
        q, rest = torch.linalg.qr(weight)
        k = min(r, q.shape[1])
        b.zero_()
        a[:k], b[:, :k] = rest[:k], q[:, :k]
        a[r:] = 0.0
        a[r : r + k], b[:, r : r + k] = rest[:k], -q[:, :k]

    def _freeze_initial(self, a: Tensor, b: Tensor) -> None:
        r = self._spec.r
        rows = torch.arange(2 * r, device=a.device) < r
        if a.requires_grad:
            cast(Any, a).register_hook(lambda gradient: gradient * rows[:, None])
            cast(Any, b).register_hook(lambda gradient: gradient * rows)


class _Osora:
    def __init__(self, spec: OsoraSpec) -> None:
        self._spec = spec

    def config(self, base: BaseWeights) -> PeftConfig:
        return OsoraConfig.of(self._spec, base=base)

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        pass

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"s": layer.osora_s[adapter_name], "o": layer.osora_o[adapter_name]}


def method_of(spec: AdapterSpec) -> Method:
    """The method that an adapter names."""
    match spec:
        case UoraSpec():
            return _Uora(spec)
        case VeraSpec():
            return _Vera(spec)
        case LoraSpec():
            return _Lora(spec)
        case OloraSpec():
            return _Olora(spec)
        case OsoraSpec():
            return _Osora(spec)
