"""UoraModel: PEFT's host for UORA adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uora.errors import ShapeError, UnsupportedLayerError
from uora.frames import check_fingerprint, fingerprint
from uora.quantised import keep_weight_layout
from uora.reinit import ReinitRule, count_hits, hits_shape
from uora.tuner._peft import QUERY_VALUE_NAMES, BaseTunerLayer, BufferDict
from uora.tuner.config import UoraConfig
from uora.tuner.layer import AdapterFrames, Linear, UoraLayer
from uora.tuner.rows import MixedBatchModel


class UoraModel(MixedBatchModel):
    """A base model with UORA adapters (use ``peft.get_peft_model(model, UoraConfig(...))``).

    Nothing here is a matrix: d and b live on the layers, hit counts here, frames come from seeds. Adapters of
    different seeds and ranks live side by side.
    """

    uses_shared_state: bool = True
    # Longer than "uora_", so that PEFT does not look for the hit counts on every layer when it loads.
    prefix: str = "uora_lambda_"
    tuner_layer_cls = UoraLayer
    target_module_mapping = {family: list(names) for family, names in QUERY_VALUE_NAMES.items()}  # noqa: RUF012

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        #: Hits, int64 of the shape of ``uora.reinit.hits_shape``, per adapter: part of what is saved.
        self.uora_hits = BufferDict({}, persistent=True)
        #: How often each |d| has counted, int64 ``(layers, r)`` per adapter: needed only to go on training.
        self.uora_counts = BufferDict({}, persistent=False)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Runs before every injection."""
        keep_weight_layout(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add one adapter, and make sure that its frames are those it was trained on.

        Raises:
            UnsupportedLayerError: a target is not a linear layer.
            FingerprintError: the frames built here differ from the configuration's.

        Whatever is raised, nothing of the adapter stays.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._set_frames(adapter_name)
            self._check_frames(adapter_name)
        except Exception:
            self._withdraw(adapter_name)
            raise

    def _set_frames(self, adapter_name: str) -> None:
        """Start the counts at zero and give every layer the frames that follow them."""
        config, layers = self.config_of(adapter_name), self.adapter_layers(adapter_name)
        hits_by_layer = config.reinit_scope == "layer"
        self.uora_hits[adapter_name] = torch.zeros(hits_shape(config.spec(), len(layers)), dtype=torch.int64)
        self.uora_counts[adapter_name] = torch.zeros(len(layers), config.r, dtype=torch.int64)
        shared = AdapterFrames(config, self.uora_hits, adapter_name)
        for position, layer in enumerate(layers.values()):
            own = AdapterFrames(config, self.uora_hits, adapter_name, position) if hits_by_layer else shared
            layer.frames[adapter_name] = own

    def _check_frames(self, adapter_name: str) -> None:
        config = self.config_of(adapter_name)
        keys = [key for layer in self.adapter_layers(adapter_name).values() for key in layer.frame_keys(adapter_name)]
        found = fingerprint(keys, config.family.cache_dir)
        if config.frame_fingerprint is not None:
            check_fingerprint(config.frame_fingerprint, found)
        config.frame_fingerprint = found

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
        if not isinstance(peft_config, UoraConfig):
            raise TypeError(f"expected a UoraConfig, found {type(peft_config).__name__}")
        if isinstance(target, Linear):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self.model)
        if not _is_linear(base, quantization):
            raise UnsupportedLayerError(
                f"Module {current_key} is a {type(base).__name__}, expected nn.Linear or Conv1D, plain or quantised. "
                "Choose other targets."
            )
        layer = Linear(target, adapter_name, peft_config, rows=self._rows, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from every layer, and its counts."""
        super().delete_adapter(adapter_name)
        for counts in (self.uora_hits, self.uora_counts):
            if adapter_name in counts:
                del counts[adapter_name]

    def config_of(self, adapter_name: str) -> UoraConfig:
        """The configuration of one adapter."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, UoraConfig):
            raise TypeError(f"expected a UoraConfig, found {type(config).__name__}")
        return config

    def adapter_layers(self, adapter_name: str) -> dict[str, Linear]:
        """The adapted layers by their names in the base model, in the model's order."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, Linear) and adapter_name in module.uora_lambda_d
        }

    @torch.no_grad()
    def reinitialise(self, adapter_name: str, step: int) -> int:
        """Apply the reinitialisation rule once, after an optimizer step.

        Args:
            adapter_name: whose d decides.
            step: optimizer steps made, from 1.

        Returns:
            The number of hits, over all layers and indices.
        """
        layers = self.adapter_layers(adapter_name).values()
        magnitudes = torch.stack([layer.uora_lambda_d[adapter_name].abs() for layer in layers])
        stored_hits, stored_counts = self.uora_hits[adapter_name], self.uora_counts[adapter_name]
        rule = ReinitRule.of(self.config_of(adapter_name).spec())
        counts, hits = count_hits(rule, magnitudes.cpu().numpy(), stored_counts.cpu().numpy(), step)
        stored_counts.copy_(torch.from_numpy(counts))
        if hits.any():  # a write that changes nothing would make every layer blend its frames anew
            added = hits if stored_hits.dim() == 2 else hits.sum(axis=0)
            stored_hits.add_(torch.from_numpy(added).to(stored_hits.device))
        return int(hits.sum())

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT loads with ``strict=False``; a missing vector must be an error, not a half-loaded adapter."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        expected = {
            name
            for name in model.state_dict()
            if name.endswith(f".{adapter_name}") and (cls.prefix in name or ".uora_hits." in name)
        }
        missing = sorted(expected - remapped.keys())
        if missing:
            raise ShapeError(f"The saved adapter lacks {len(missing)} tensors, the first is {missing[0]}.")
        return remapped


def _is_linear(layer: nn.Module, quantization: dict[str, Any]) -> bool:
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(layer, **quantization)
    return backend is not None and backend.layer_type == "linear"


def reinitialise(model: PeftModel, adapter_name: str = "default", *, step: int) -> int:
    """Apply the reinitialisation rule once, after optimizer step ``step`` (from 1); returns the number of hits."""
    if not isinstance(model.base_model, UoraModel):
        raise TypeError(f"expected a PeftModel with UORA adapters, found {type(model.base_model).__name__}")
    return model.base_model.reinitialise(adapter_name, step)
