"""OsoraModel: PEFT's host for OSoRA adapters."""

from __future__ import annotations

import torch
from peft import PeftConfig
from torch import nn

from uora.frames import check_fingerprint
from uora.osora.config import OsoraConfig
from uora.osora.layer import OsoraLinear
from uora.svd import BaseWeights
from uora.tuner._peft import QUERY_VALUE_NAMES
from uora.tuner.additive import AdditiveModel


class OsoraModel(AdditiveModel[OsoraConfig, OsoraLinear]):
    """A base model with OSoRA adapters (use ``peft.get_peft_model(model, OsoraConfig(...))``).

    The base weights are never changed: what the paper takes out of them is part of the update.
    """

    uses_shared_state: bool = True
    prefix: str = "osora_"
    config_cls = OsoraConfig
    tuner_layer_cls = OsoraLinear
    target_module_mapping = {family: list(names) for family, names in QUERY_VALUE_NAMES.items()}  # noqa: RUF012

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self._own_weights = BaseWeights.of_model(model)

    def add_to_layer(self, layer: OsoraLinear, adapter_name: str, config: OsoraConfig) -> None:
        """o = 1; s follows in `complete`, with the factors."""
        vectors = {"osora_o": torch.ones(layer.out_features), "osora_s": torch.zeros(config.r)}
        layer.add_adapter(adapter_name, vectors, dropout=config.dropout)

    def complete(self, adapter_name: str) -> None:
        """Give every layer its factors, which must be those the adapter was trained on."""
        config, layers = self.config_of(adapter_name), self.adapter_layers(adapter_name)
        base = config.base_weights or self._own_weights
        found = base.fingerprint(layers, config.r)
        if config.svd_fingerprint is not None:
            check_fingerprint(config.svd_fingerprint, found)
        config.svd_fingerprint = found
        for name, factors in base.all_factors(layers, config.r).items():
            layers[name].start(adapter_name, factors)
