"""UoraModel: PEFT's host for UORA adapters."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from uora.frames import check_fingerprint, fingerprint
from uora.reinit import ReinitRule, count_hits, hits_shape
from uora.tuner._peft import QUERY_VALUE_NAMES, BufferDict
from uora.tuner.additive import AdditiveModel
from uora.tuner.config import UoraConfig
from uora.tuner.layer import AdapterFrames, UoraLinear


class UoraModel(AdditiveModel[UoraConfig, UoraLinear]):
    """A base model with UORA adapters (use ``peft.get_peft_model(model, UoraConfig(...))``).

    Nothing here is a matrix: d and b live on the layers, numbers of hits here, frames come from seeds. Adapters of
    different seeds and ranks live side by side.
    """

    uses_shared_state: bool = True
    # Longer than "uora_", so that PEFT does not look for the hits on every layer when it loads.
    prefix: str = "uora_lambda_"
    config_cls = UoraConfig
    tuner_layer_cls = UoraLinear
    target_module_mapping = {family: list(names) for family, names in QUERY_VALUE_NAMES.items()}  # noqa: RUF012

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        #: Numbers of hits, int64 of the shape of ``uora.reinit.hits_shape``, per adapter: part of what is saved.
        self.uora_hits = BufferDict({}, persistent=True)
        #: How often each |d| has counted, int64 ``(layers, r)`` per adapter: needed only to go on training.
        self.uora_counts = BufferDict({}, persistent=False)

    def add_to_layer(self, layer: UoraLinear, adapter_name: str, config: UoraConfig) -> None:
        """d = d_initial, b = 0."""
        vectors = {
            "uora_lambda_d": torch.full((config.r,), float(config.d_initial)),
            "uora_lambda_b": torch.zeros(layer.out_features),
        }
        layer.add_adapter(adapter_name, vectors, dropout=config.dropout)

    def complete(self, adapter_name: str) -> None:
        """Start the counts at zero and give every layer its frames, which must be those the adapter was trained on."""
        config, layers = self.config_of(adapter_name), self.adapter_layers(adapter_name)
        self.uora_hits[adapter_name] = torch.zeros(hits_shape(config.spec(), len(layers)), dtype=torch.int64)
        self.uora_counts[adapter_name] = torch.zeros(len(layers), config.r, dtype=torch.int64)
        shared = AdapterFrames(config, self.uora_hits, adapter_name)
        for position, layer in enumerate(layers.values()):
            by_layer = config.reinit_scope == "layer"
            own = AdapterFrames(config, self.uora_hits, adapter_name, position) if by_layer else shared
            layer.frames[adapter_name] = own
        keys = [key for layer in layers.values() for key in layer.frame_keys(adapter_name)]
        found = fingerprint(keys, config.family.cache_dir)
        if config.frame_fingerprint is not None:
            check_fingerprint(config.frame_fingerprint, found)
        config.frame_fingerprint = found

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from every layer, and its counts."""
        super().delete_adapter(adapter_name)
        for counts in (self.uora_hits, self.uora_counts):
            if adapter_name in counts:
                del counts[adapter_name]

    @classmethod
    def is_stored(cls, name: str) -> bool:
        """The vectors, and the hits."""
        return super().is_stored(name) or ".uora_hits." in name

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


def reinitialise(model: PeftModel, adapter_name: str = "default", *, step: int) -> int:
    """Apply the reinitialisation rule once, after optimizer step ``step`` (from 1); returns the number of hits."""
    if not isinstance(model.base_model, UoraModel):
        raise TypeError(f"expected a PeftModel with UORA adapters, found {type(model.base_model).__name__}")
    return model.base_model.reinitialise(adapter_name, step)
