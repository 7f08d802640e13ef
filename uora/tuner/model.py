"""UoraModel: PEFT's host for UORA adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uora.errors import AdapterNotFoundError, ArtifactError, ShapeError, SpecError
from uora.frames import check_fingerprint, fingerprint
from uora.reinit import count_hits
from uora.tuner._peft import QUERY_VALUE_NAMES, BaseTuner, BaseTunerLayer, BufferDict
from uora.tuner.config import UoraConfig
from uora.tuner.layer import BASE, AdapterFrames, Linear, RowAdapters, UoraLayer


class UoraModel(BaseTuner):
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
        """Runs for the first adapter only, once nn.Module is ready for buffers."""
        #: Hits per index, int64 ``(r,)`` per adapter: part of what is saved.
        self.uora_hits = BufferDict({}, persistent=True)
        #: How often each |d| was below tau, int64 ``(layers, r)`` per adapter: needed only to go on training.
        self.uora_counts = BufferDict({}, persistent=False)
        self._rows = RowAdapters()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add one adapter, and make sure that its frames are those it was trained on.

        Raises:
            FingerprintError: the frames built here differ from the configuration's; the adapter is removed again.
        """
        config = self.config_of(adapter_name)
        self.uora_hits[adapter_name] = torch.zeros(config.r, dtype=torch.int64)
        self._frames = AdapterFrames(config, self.uora_hits, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = self.adapter_layers(adapter_name)
        self.uora_counts[adapter_name] = torch.zeros(len(layers), config.r, dtype=torch.int64)
        keys = [key for layer in layers.values() for key in layer.frame_keys(adapter_name)]
        found = fingerprint(keys, config.family.cache_dir)
        try:
            if config.frame_fingerprint is not None:
                check_fingerprint(config.frame_fingerprint, found)
        except ArtifactError:
            self.delete_adapter(adapter_name)
            raise
        config.frame_fingerprint = found

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
            target.update_layer(adapter_name, peft_config, frames=self._frames)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise SpecError(
                f"Module {current_key} is a {type(base).__name__}; UORA adapts nn.Linear and Conv1D. Choose other "
                "target_modules.",
                param="targets",
            )
        layer = Linear(target, adapter_name, peft_config, frames=self._frames, rows=self._rows)
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
            if isinstance(module, Linear) and adapter_name in module.frames
        }

    @torch.no_grad()
    def reinitialise(self, adapter_name: str) -> int:
        """Apply the reinitialisation rule once, after an optimizer step.

        Returns:
            The number of hits, over all layers and indices.
        """
        layers = self.adapter_layers(adapter_name).values()
        magnitudes = torch.stack([layer.uora_lambda_d[adapter_name].abs() for layer in layers])
        rule = self.config_of(adapter_name).reinit_rule
        counts, hits = count_hits(rule, magnitudes, self.uora_counts[adapter_name].to(magnitudes.device))
        self.uora_counts[adapter_name].copy_(counts)
        new = int(hits.sum())
        if new:
            self.uora_hits[adapter_name].add_(hits.to(self.uora_hits[adapter_name].device))
        return new

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each row of this forward the adapter named for it in ``adapter_names``."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_row_names(names)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        previous = self._rows.names
        self._rows.names = tuple(name for name in names for _ in range(copies))
        try:
            yield
        finally:  # a forward that raises must not answer the next request with this one's adapters
            self._rows.names = previous

    def _check_row_names(self, names: list[str]) -> None:
        if self.training:
            raise ValueError("adapter_names works in inference only; call model.eval() first.")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise AdapterNotFoundError(
                f"Unknown adapters {unknown} in adapter_names; loaded are {sorted(self.peft_config)} and {BASE!r}."
            )
        if any(isinstance(module, UoraLayer) and module.merged for module in self.model.modules()):
            raise ValueError("adapter_names cannot be used while an adapter is merged; unmerge first.")

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
