"""A tuner whose adapters add an update to the output of linear layers: what our methods have in common."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar, cast

import torch
from peft import PeftConfig
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from uora.errors import ShapeError, UnsupportedLayerError
from uora.quantised import keep_weight_layout
from uora.tuner._peft import BaseTunerLayer, check_adapters_to_merge, get_in_out_features
from uora.tuner.pairs import Pair, Segment, add_pairs
from uora.tuner.rows import Joint, MixedBatchModel, RowAdapters


class AdditiveLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear or Conv1D, plain or quantised) whose adapters each add an update to its output.

    A subclass names its trained vectors in ``adapter_layer_names`` and what else it keeps per adapter in
    ``other_param_names``, and says what the update is. Its own name holds "Linear": by that PEFT finds the layers again
    when another adapter goes on "all-linear".
    """

    other_param_names: tuple[str, ...] = ("dropout",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, rows: RowAdapters, **quantization: Any) -> None:
        """Wrap a layer, which has no adapter yet; ``quantization`` is what PEFT knows of a quantised model."""
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.rows = rows
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.dropout = nn.ModuleDict({})
        self.merged_adapters: list[str] = []
        #: The base layer as it was before a merge; the list hides it from nn.Module.
        self._unmerged: list[nn.Module] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        #: The same layer of the models that this one's leads (``uora.tuner.joining``), by their numbers.
        self.members: dict[int, Self] = {}
        self.in_features, self.out_features = cast(tuple[int, int], get_in_out_features(self.get_base_layer()))

    @abstractmethod
    def update(self, x: Tensor, adapter_name: str) -> Tensor:
        """One adapter's update ``(..., out)`` for activations ``(..., in)``."""

    @abstractmethod
    def pair(self, adapter_name: str, *, like: Tensor) -> Pair:
        """The same update as two factors, in the device and dtype of ``like``, differentiable in what is trained."""

    @abstractmethod
    def mixed_update(self, x: Tensor, group: Any, adapter_names: Sequence[str]) -> Tensor:
        """Updates ``(rows, ..., out)`` for activations ``(rows, ..., in)`` of adapters of one group, a name per row."""

    @abstractmethod
    def group_of(self, adapter_name: str) -> Hashable:
        """What the rows of an adapter on this layer can share a product by."""

    @abstractmethod
    def delta_weight(self, adapter_name: str) -> Tensor:
        """dW, float32 ``(out, in)``."""

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter is on this layer."""
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def add_adapter(self, adapter_name: str, vectors: Mapping[str, Tensor], *, dropout: float) -> None:
        """Add one adapter: the start of its trained vectors by their names, float32."""
        self.dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        for name, start in vectors.items():
            getattr(self, name)[adapter_name] = nn.Parameter(start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        """PEFT moves adapters to both; without a dtype, vectors stay float32 and are not rounded on the way."""
        device, _ = super()._get_base_layer_device_and_dtype(base_layer)
        return device, None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """dW in float32, in the orientation of the base layer's weight."""
        weight = self.delta_weight(adapter_name)
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW of the named (default: active) adapters to the base weight, in float32, rounded (or quantised) once.

        It goes into a copy of the base layer. So a weight tied to another module's leaves that one alone, and
        `unmerge` is exact, at the price of both layers in memory until then.

        Raises:
            ValueError: ``safe_merge`` and the result is not finite; the weight is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
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
        """Take every merged dW out again: the base layer is the one there was before."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        self.base_layer = self._unmerged.pop().to(self.weight.device)  # the model may have been moved meanwhile
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Base layer plus the updates of the active adapters, or of each row's own in a mixed batch."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.training and torch.is_grad_enabled() and not (self.disable_adapters or self.merged):
            return self._forward_training(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.rows.names is not None:
            return self._forward_rows(x, result)
        for name in self.active_adapters:
            if self.has(name):
                result = result + self.update(self.dropout[name](x), name).to(result.dtype)
        return result

    def _forward_training(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The same, with the least to compute and to keep for a backward pass (``uora.tuner.pairs``)."""
        # As a matrix from here on: what a linear layer makes of more dimensions is a view, not to be written to.
        result: Tensor = self.base_layer(x.reshape(-1, x.shape[-1]), *args, **kwargs)
        if self.rows.joint is not None:
            result = self.joint_update(result, x, self.rows.joint)
            return result.view(*x.shape[:-1], -1)
        whole = [Segment(0, len(result))]
        for name in self.active_adapters:
            if self.has(name):
                a, c = self.pair(name, like=result)
                z = self.rows.products.project(self.dropout[name](x).to(a.dtype), a)
                result = add_pairs(result, z.reshape(-1, len(a)), [c], whole)
        return result.view(*x.shape[:-1], -1)

    def joint_update(self, result: Tensor, x: Tensor, joint: Joint) -> Tensor:
        """Add to every token the update of its own model's adapter, in place.

        Args:
            result: the base layer's output, ``(tokens, out)``.
            x: its input, ``(..., in)``.
            joint: whose the tokens are.
        """
        layers = [self.members[number] for number in joint.members]
        pairs = [layer.pair(layer.active_adapters[0], like=result) for layer in layers]
        if all(pair.a is pairs[0].a for pair in pairs):
            z = self.rows.products.project(x.to(result.dtype), pairs[0].a).reshape(len(result), -1)
        else:
            tokens = x.to(result.dtype).reshape(len(result), -1)
            places = [tokens[segment.start : segment.stop] for segment in joint.segments]
            z = torch.cat([F.linear(own, pair.a) for own, pair in zip(places, pairs, strict=True)])
        return add_pairs(result, z, [pair.c for pair in pairs], joint.segments)

    def _forward_rows(self, x: Tensor, result: Tensor) -> Tensor:
        for group, rows, names in self.rows.groups(x.shape[0], lambda n: self.group_of(n) if self.has(n) else None):
            update = self.mixed_update(x[rows], group, names).to(result.dtype)
            result = result.index_add(0, torch.tensor(rows, device=x.device), update)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update has a low rank, so PEFT may convert it."""
        return True


Config = TypeVar("Config", bound=PeftConfig)
Layer = TypeVar("Layer", bound=AdditiveLinear)


class AdditiveModel(MixedBatchModel, Generic[Config, Layer]):
    """A base model with adapters of one method on `AdditiveLinear` layers."""

    config_cls: type[Config]
    tuner_layer_cls: type[Layer]

    @abstractmethod
    def add_to_layer(self, layer: Layer, adapter_name: str, config: Config) -> None:
        """Put a new adapter's vectors on one layer."""

    @abstractmethod
    def complete(self, adapter_name: str) -> None:
        """What is left to do when the adapter is on all its layers; if it raises, nothing of the adapter stays."""

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Runs before every injection."""
        keep_weight_layout(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add one adapter.

        Raises:
            UnsupportedLayerError: a target is not a linear layer.
            FingerprintError: what the adapter was trained on cannot be made again here.

        Whatever is raised, nothing of the adapter stays.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self.complete(adapter_name)
        except Exception:
            self._withdraw(adapter_name)
            raise

    def _withdraw(self, adapter_name: str) -> None:
        """Undo an injection, also one that got halfway."""
        self.delete_adapter(adapter_name)
        if not self.peft_config:
            self.unload()

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self.add_to_layer(target, adapter_name, self.config_of(adapter_name))
            return
        quantization = get_quantization_kwargs(self.model)
        _check_linear(target, current_key, quantization)
        layer = self.tuner_layer_cls(target, adapter_name, rows=self._rows, **quantization)
        self.add_to_layer(layer, adapter_name, self.config_of(adapter_name))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def config_of(self, adapter_name: str) -> Config:
        """The configuration of one adapter."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, self.config_cls):
            raise TypeError(f"expected a {self.config_cls.__name__}, found {type(config).__name__}")
        return config

    def adapter_layers(self, adapter_name: str) -> dict[str, Layer]:
        """The adapted layers by their names in the base model, in the model's order."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, self.tuner_layer_cls) and module.has(adapter_name)
        }

    @classmethod
    def is_stored(cls, name: str) -> bool:
        """Whether a name in the state is that of an adapter's own numbers."""
        return cls.prefix in name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT loads with ``strict=False``; a missing vector must be an error, not a half-loaded adapter."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        missing = sorted(
            name
            for name in model.state_dict()
            if cls.is_stored(name) and name.endswith(f".{adapter_name}") and name not in remapped
        )
        if missing:
            raise ShapeError(f"The saved adapter lacks {len(missing)} tensors, the first is {missing[0]}.")
        return remapped


def _check_linear(target: nn.Module, name: str, quantization: dict[str, Any]) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = resolve_quantization_backend(base, **quantization)
    if isinstance(base, (nn.Linear, Conv1D)) or (backend is not None and backend.layer_type == "linear"):
        return
    raise UnsupportedLayerError(
        f"Module {name} is a {type(base).__name__}, expected nn.Linear or Conv1D, plain or quantised. "
        "Choose other targets."
    )
