"""UORA on one linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uora.delta import Family, delta, frame_tensor, mixed_delta
from uora.errors import AdapterNotFoundError, SpecError
from uora.frames import FrameKey, Side
from uora.reinit import blend, weights
from uora.tuner._peft import BaseTunerLayer, BufferDict, check_adapters_to_merge, get_in_out_features
from uora.tuner.config import UoraConfig

#: PEFT's name for "no adapter" in ``adapter_names``.
BASE = "__base__"


class AdapterFrames:
    """The frames of one adapter after its hits, shared by all its layers.

    Only the hit counts are state. The blended frames are kept for the forward until the counts change.
    """

    def __init__(self, config: UoraConfig, hits: BufferDict, adapter_name: str) -> None:
        self.family: Family = config.family
        self.alpha: float = config.alpha
        self._hits = hits
        self._adapter_name = adapter_name
        self._blended: dict[tuple[Side, int, torch.device, torch.dtype], Tensor] = {}
        self._blended_for: tuple[int, int] | None = None

    @property
    def hits(self) -> Tensor:
        """Hits per index, int64 ``(r,)``."""
        hits: Tensor = self._hits[self._adapter_name]
        return hits

    def weight(self) -> Tensor | None:
        """w = alpha ** hits, ``(r,)``; None if nothing was hit yet."""
        return weights(self.alpha, self.hits) if bool(self.hits.any()) else None

    def get(self, side: Side, features: int, *, like: Tensor) -> Tensor:
        """The blended frame, ``(r, features)``, in the device and dtype of ``like``."""
        self._forget_if_hit()
        slot = (side, features, like.device, like.dtype)
        if slot not in self._blended:
            self._blended[slot] = self._blend(side, features, like)
        return self._blended[slot]

    def _blend(self, side: Side, features: int, like: Tensor) -> Tensor:
        start = frame_tensor(self.family, side, 0, features, like=like)
        weight = self.weight()
        if weight is None:
            return start
        with torch.inference_mode(False):
            exact = torch.empty(0, device=like.device)  # blend in float32, round once
            return blend(
                frame_tensor(self.family, side, 0, features, like=exact),
                frame_tensor(self.family, side, 1, features, like=exact),
                weight.to(like.device),
            ).to(like.dtype)

    def _forget_if_hit(self) -> None:
        """Drop the blended frames once the counts were written to (or replaced, as loading may do)."""
        hits = self.hits
        version = (id(hits), hits._version)
        if version != self._blended_for:
            self._blended.clear()
            self._blended_for = version


@dataclass
class RowAdapters:
    """Which adapter each row of the running forward belongs to; None outside a mixed batch."""

    names: tuple[str, ...] | None = None

    def by_family(self, layer: UoraLayer) -> Iterator[tuple[Family, list[int], list[str]]]:
        """Rows of ``layer`` that need an update, grouped by what they can share."""
        groups: dict[Family, tuple[list[int], list[str]]] = {}
        for row, name in enumerate(self.names or ()):
            if name in layer.frames:
                rows, names = groups.setdefault(layer.frames[name].family, ([], []))
                rows.append(row)
                names.append(name)
        for family, (rows, names) in groups.items():
            yield family, rows, names


class UoraLayer(BaseTunerLayer):
    """State of every UORA adapter on one layer: d ``(r,)`` and b ``(out,)`` are trained, nothing else is stored."""

    adapter_layer_names = ("uora_lambda_b", "uora_lambda_d")
    other_param_names = ("dropout", "frames")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.uora_lambda_b = nn.ParameterDict({})
        self.uora_lambda_d = nn.ParameterDict({})
        self.dropout = nn.ModuleDict({})
        self.frames: dict[str, AdapterFrames] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _sizes(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, config: UoraConfig, *, frames: AdapterFrames, inference_mode: bool = False
    ) -> None:
        """Add one adapter: d = d_initial, b = 0, both float32."""
        self.frames[adapter_name] = frames
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
        raise SpecError(f"A {type(layer).__name__} is no linear layer; UORA adapts nn.Linear and Conv1D.")
    return size_in, size_out


@dataclass
class _Factors:
    """dW = ``b[:, None] * (B @ (d[:, None] * A))``, in float32."""

    a: Tensor  # (r, in)
    b_rows: Tensor  # (r, out)
    d: Tensor  # (r,)
    b: Tensor  # (out,)


class Linear(nn.Module, UoraLayer):
    """A linear layer (``nn.Linear`` or transformers' ``Conv1D``) with UORA adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: UoraConfig,
        *,
        frames: AdapterFrames,
        rows: RowAdapters,
    ) -> None:
        super().__init__()
        UoraLayer.__init__(self, base_layer)
        self.rows = rows
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, frames=frames)

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
        """Add dW of the named (default: active) adapters to the base weight.

        Raises:
            ValueError: ``safe_merge`` and the result is not finite; the weight is left as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.frames:
                merged = self._shifted(self.get_delta_weight(name))
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"Merging adapter {name!r} gives weights that are not finite; it is broken.")
                self.set_base_weight(merged)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take every merged dW out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.set_base_weight(self._shifted(-self.get_delta_weight(self.merged_adapters.pop())))

    def _shifted(self, change: Tensor) -> Tensor:
        """Base weight plus ``change``, added in float32 and rounded once."""
        weight: Tensor = self.get_base_weight()
        return (weight.float() + change).to(weight.dtype)

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
        names = self.rows.names or ()
        if len(names) != x.shape[0]:
            raise AdapterNotFoundError(
                f"adapter_names has {len(names)} names for {x.shape[0]} rows; give one name per row."
            )
        for family, rows, members in self.rows.by_family(self):
            update = mixed_delta(
                x[rows],
                family,
                d=torch.stack([self.uora_lambda_d[name] for name in members]),
                b=torch.stack([self.uora_lambda_b[name] for name in members]),
                weight=self._row_weights(members),
            )
            result = result.index_add(0, torch.tensor(rows, device=x.device), update)
        return result

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
