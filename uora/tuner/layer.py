"""UORA on one linear layer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uora.delta import Family, delta, frame_tensor, mixed_delta
from uora.errors import UnsupportedLayerError
from uora.frames import FrameKey, Side
from uora.reinit import ReinitRule, blend, weights
from uora.tuner._peft import BaseTunerLayer, BufferDict, check_adapters_to_merge, get_in_out_features
from uora.tuner.config import UoraConfig
from uora.tuner.rows import RowAdapters


class AdapterFrames:
    """The frames of one adapter after its hits: of all its layers, or of one where each layer has hits of its own.

    Only the numbers of hits are state. What follows from them is kept for the forward until they change.
    """

    def __init__(self, config: UoraConfig, hits: BufferDict, adapter_name: str, layer: int | None = None) -> None:
        """Frames of an adapter.

        Args:
            config: the adapter's.
            hits: every adapter's numbers of hits.
            adapter_name: which of them.
            layer: the layer's position among the adapted ones; None if all layers share their frames.
        """
        self.family: Family = config.family
        self._rule = ReinitRule.of(config.spec())
        self._hits = hits
        self._adapter_name = adapter_name
        self._layer = layer
        self._derived_from: tuple[Tensor, int] | None = None
        self._weight: Tensor | None = None
        self._blended: dict[tuple[Side, int, torch.device, torch.dtype], Tensor] = {}

    def weight(self) -> Tensor | None:
        """Share w of the start frames, float32 ``(r,)`` on the CPU; None where nothing was hit."""
        self._follow_hits()
        return self._weight

    def get(self, side: Side, features: int, *, like: Tensor) -> Tensor:
        """The blended frame, ``(r, features)``, in the device and dtype of ``like``."""
        weight = self.weight()
        if weight is None:
            return frame_tensor(self.family, side, 0, features, like=like)
        slot = (side, features, like.device, like.dtype)
        if slot not in self._blended:
            self._blended[slot] = self._blend(side, features, weight, like)
        return self._blended[slot]

    def _blend(self, side: Side, features: int, weight: Tensor, like: Tensor) -> Tensor:
        with torch.inference_mode(False):
            exact = torch.empty(0, device=like.device)  # blend in float32, round once
            start, target = (frame_tensor(self.family, side, g, features, like=exact) for g in (0, 1))
            return blend(start, target, weight.to(like.device)).to(like.dtype)

    def _follow_hits(self) -> None:
        """Derive everything anew once the hits were written to, or replaced, as loading may do."""
        hits: Tensor = self._hits[self._adapter_name]
        if self._derived_from is not None:
            seen, version = self._derived_from
            if seen is hits and version == hits._version:
                return
        self._derived_from = (hits, hits._version)
        self._blended.clear()
        own = (hits if self._layer is None else hits[self._layer]).cpu().numpy()
        with torch.inference_mode(False):
            self._weight = torch.from_numpy(weights(self._rule, own)) if own.any() else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy derives its own: its hits may have another history."""
        return self.__dict__ | {"_derived_from": None, "_weight": None, "_blended": {}}


class UoraLayer(BaseTunerLayer):
    """State of every UORA adapter on one layer: d ``(r,)`` and b ``(out,)`` are trained, nothing else is stored."""

    adapter_layer_names = ("uora_lambda_b", "uora_lambda_d")
    other_param_names = ("dropout", "frames")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.uora_lambda_b = nn.ParameterDict({})
        self.uora_lambda_d = nn.ParameterDict({})
        self.dropout = nn.ModuleDict({})
        self.frames: dict[str, AdapterFrames] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _sizes(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: UoraConfig, *, inference_mode: bool = False) -> None:
        """Add one adapter: d = d_initial, b = 0, both float32. Its frames come once all its layers are known."""
        dropout = nn.Dropout(config.dropout) if config.dropout > 0.0 else nn.Identity()
        self.dropout[adapter_name] = dropout
        self.uora_lambda_d[adapter_name] = nn.Parameter(torch.full((config.r,), float(config.d_initial)))
        self.uora_lambda_b[adapter_name] = nn.Parameter(torch.zeros(self.out_features))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def frame_keys(self, adapter_name: str) -> list[FrameKey]:
        """Every frame this layer uses for ``adapter_name``: both sides, start and target."""
        family = self.frames[adapter_name].family
        sides: tuple[tuple[Side, int], ...] = (("A", self.in_features), ("B", self.out_features))
        return [family.key(side, generation, features) for side, features in sides for generation in (0, 1)]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A UORA update has rank r, so PEFT may convert it."""
        return True


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    size_in, size_out = get_in_out_features(layer)
    if size_in is None or size_out is None:
        raise UnsupportedLayerError(f"A {type(layer).__name__} is no linear layer; choose other targets.")
    return size_in, size_out


@dataclass
class _Factors:
    """dW = ``b[:, None] * (B @ (d[:, None] * A))``, in float32."""

    a: Tensor  # (r, in)
    b_rows: Tensor  # (r, out)
    d: Tensor  # (r,)
    b: Tensor  # (out,)


class Linear(nn.Module, UoraLayer):
    """A linear layer (``nn.Linear``, transformers' ``Conv1D``, or one that PEFT can dequantise) with UORA adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: UoraConfig, *, rows: RowAdapters, **quantization: Any
    ) -> None:
        super().__init__()
        UoraLayer.__init__(self, base_layer, **quantization)
        self.rows = rows
        #: The base layer as it was before a merge; the list hides it from nn.Module.
        self._unmerged: list[nn.Module] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def factors(self, adapter_name: str) -> _Factors:
        """The four factors of dW in float32, on the layer's device."""
        frames = self.frames[adapter_name]
        d = self.uora_lambda_d[adapter_name].detach().float()
        b = self.uora_lambda_b[adapter_name].detach().float()
        return _Factors(
            a=frames.get("A", self.in_features, like=d),
            b_rows=frames.get("B", self.out_features, like=b),
            d=d,
            b=b,
        )

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """dW in float32, in the orientation of the base layer's weight."""
        f = self.factors(adapter_name)
        weight = (f.b.unsqueeze(-1) * f.b_rows.T) @ (f.d.unsqueeze(-1) * f.a)  # (out, in)
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW of the named (default: active) adapters to the base weight, in float32, rounded (or quantised) once.

        The base layer is copied first. So a weight tied to another module's leaves that one alone, and `unmerge` is
        exact, at the price of both copies in memory until then.

        Raises:
            ValueError: ``safe_merge`` and the result is not finite; the weight is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.frames]
        if not names:
            return
        weight: Tensor = self.get_base_weight()
        merged = weight.float() + sum(self.get_delta_weight(name) for name in names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"Merging the adapters {names} gives weights that are not finite; one of them is broken.")
        if not self.merged:
            self._unmerged.append(self.base_layer)
            self.base_layer = copy.deepcopy(self.base_layer)
        self.set_base_weight(merged.to(weight.dtype))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take every merged dW out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        self.base_layer = self._unmerged.pop()
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Base layer plus the updates of the active adapters, or of each row's own in a mixed batch."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.rows.names is not None:
            return self._mixed(x, result)
        for name in self.active_adapters:
            if name in self.frames:
                result = result + self._delta(x, name)
        return result

    def _delta(self, x: Tensor, name: str) -> Tensor:
        frames = self.frames[name]
        return delta(
            self.dropout[name](x),
            frames.get("A", self.in_features, like=x),
            frames.get("B", self.out_features, like=x),
            self.uora_lambda_d[name],
            self.uora_lambda_b[name],
        )

    def _mixed(self, x: Tensor, result: Tensor) -> Tensor:
        for family, rows, members in self.rows.groups(x.shape[0], self._family_of):
            update = mixed_delta(
                x[rows],
                family,
                d=torch.stack([self.uora_lambda_d[name] for name in members]),
                b=torch.stack([self.uora_lambda_b[name] for name in members]),
                weight=self._row_weights(members),
            )
            result = result.index_add(0, torch.tensor(rows, device=x.device), update)
        return result

    def _family_of(self, name: str) -> Family | None:
        return self.frames[name].family if name in self.frames else None

    def _row_weights(self, names: list[str]) -> Tensor | None:
        """w per row, ``(rows, r)``; None if no row's adapter has hits."""
        found = [self.frames[name].weight() for name in names]
        if all(weight is None for weight in found):
            return None
        ones = [
            torch.ones(self.frames[name].family.r) if w is None else w for name, w in zip(names, found, strict=True)
        ]
        device = self.uora_lambda_d[names[0]].device
        return torch.stack([weight.to(device) for weight in ones])

    def __repr__(self) -> str:
        return "uora." + super().__repr__()
