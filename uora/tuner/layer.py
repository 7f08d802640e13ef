"""UORA on one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uora.delta import Family, both_frames, delta, frame_tensor, mixed_delta
from uora.frames import FrameKey, Side
from uora.reinit import ReinitRule, blend, weights
from uora.tuner._peft import BufferDict
from uora.tuner.additive import AdditiveLinear
from uora.tuner.config import UoraConfig
from uora.tuner.pairs import Pair, add_mixed, scaled_rows
from uora.tuner.rows import Joint


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


def _shares(frames: Sequence[AdapterFrames], *, like: Tensor) -> Tensor | None:
    """Each adapter's share w of the start frames, ``(adapters, r)``, beside ``like``; None if none has hits."""
    found = [own.weight() for own in frames]
    if all(weight is None for weight in found):
        return None
    shares = torch.ones(like.shape, device=like.device, dtype=like.dtype)
    for row, weight in zip(shares, found, strict=True):
        if weight is not None:
            row.copy_(weight)
    return shares


class _Factors(NamedTuple):
    """What an update is made of: ``dW = diag(b) B diag(d) A``."""

    a: Tensor  # (r, in)
    b_rows: Tensor  # (r, out)
    d: Tensor  # (r,)
    b: Tensor  # (out,)


class UoraLinear(AdditiveLinear):
    """A linear layer with UORA adapters: d ``(r,)`` and b ``(out,)`` are trained, nothing else is stored."""

    adapter_layer_names = ("uora_lambda_b", "uora_lambda_d")
    other_param_names = ("dropout", "frames")

    uora_lambda_b: nn.ParameterDict
    uora_lambda_d: nn.ParameterDict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Set once all layers of an adapter are known.
        self.frames: dict[str, AdapterFrames] = {}

    def frame_keys(self, adapter_name: str) -> list[FrameKey]:
        """Every frame this layer uses for ``adapter_name``: both sides, start and target."""
        family = self.frames[adapter_name].family
        return [family.key(side, generation, features) for side, features in self._sides for generation in (0, 1)]

    @property
    def _sides(self) -> tuple[tuple[Side, int], tuple[Side, int]]:
        """The sides that have a frame, with their features."""
        return ("A", self.in_features), ("B", self.out_features)

    def _factors(self, adapter_name: str, *, like: Tensor) -> _Factors:
        frames = self.frames[adapter_name]
        return _Factors(
            a=frames.get("A", self.in_features, like=like),
            b_rows=frames.get("B", self.out_features, like=like),
            d=self.uora_lambda_d[adapter_name],
            b=self.uora_lambda_b[adapter_name],
        )

    def update(self, x: Tensor, adapter_name: str) -> Tensor:
        """``b * (B (d * (A x)))``."""
        return delta(x, *self._factors(adapter_name, like=x))

    def pair(self, adapter_name: str, *, like: Tensor) -> Pair:
        """A, and ``(diag(b) B diag(d))^T``."""
        frames = self.frames[adapter_name]
        d, b = self.uora_lambda_d[adapter_name], self.uora_lambda_b[adapter_name]
        rows = frames.get("B", self.out_features, like=d)
        return Pair(frames.get("A", self.in_features, like=like), scaled_rows(rows, d, b, dtype=like.dtype))

    def joint_update(self, result: Tensor, x: Tensor, joint: Joint) -> Tensor:
        """As for any method; all adapters of one family share the two products with its frames too."""
        layers = [self.members[number] for number in joint.members]
        names = [layer.active_adapters[0] for layer in layers]
        frames = [layer.frames[name] for layer, name in zip(layers, names, strict=True)]
        family = frames[0].family
        if any(own.family != family for own in frames):
            return super().joint_update(result, x, joint)
        d, b = (
            torch.stack([vectors[name] for vectors, name in zip(own, names, strict=True)])
            for own in ([m.uora_lambda_d for m in layers], [m.uora_lambda_b for m in layers])
        )
        share = _shares(frames, like=d)
        if share is None:
            a, rows = (frame_tensor(family, side, 0, features, like=result) for side, features in self._sides)
        else:
            a, rows = (both_frames(family, side, features, like=result) for side, features in self._sides)
        z = self.rows.products.project(x.to(a.dtype), a).reshape(len(result), -1)
        return add_mixed(result, z, rows, d, b, joint.owners, share)

    def mixed_update(self, x: Tensor, group: Family, adapter_names: Sequence[str]) -> Tensor:
        """The same with each row's own d, b and w."""
        d, b = (torch.stack([own[name] for name in adapter_names]) for own in (self.uora_lambda_d, self.uora_lambda_b))
        return mixed_delta(x, group, d=d, b=b, weight=_shares([self.frames[name] for name in adapter_names], like=d))

    def group_of(self, adapter_name: str) -> Family:
        """Rows of one family share the products with its frames."""
        return self.frames[adapter_name].family

    def delta_weight(self, adapter_name: str) -> Tensor:
        """``diag(b) B diag(d) A``, in float32."""
        a, b_rows, d, b = self._factors(adapter_name, like=self.uora_lambda_d[adapter_name].detach().float())
        return (b.detach().float().unsqueeze(-1) * b_rows.T) @ (d.detach().float().unsqueeze(-1) * a)  # (out, in)

    def __repr__(self) -> str:
        return "uora." + super().__repr__()
