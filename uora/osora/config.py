"""OsoraConfig: the method's parameters as PEFT carries them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self, cast

from uora.spec import OsoraSpec, Targets
from uora.svd import BaseWeights
from uora.tuner.config import AdditiveConfig


@dataclass
class OsoraConfig(AdditiveConfig):
    """OSoRA for ``peft.get_peft_model``. Defaults and bounds are those of ``uora.spec.OsoraSpec``.

    Attributes:
        r: rank; beyond a layer's smaller side it changes nothing.
        svd_fingerprint: probes of the singular factors trained on; filled in at injection, checked at loading.
        base_weights: where the factors come from; None for the weights of the model itself. A setting of the machine,
            never saved.
    """

    spec_cls = OsoraSpec

    svd_fingerprint: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "Probes of the singular factors trained on."}
    )
    base_weights: BaseWeights | None = field(
        default=None, repr=False, metadata={"help": "Where the singular factors come from."}
    )

    @classmethod
    def of(
        cls, spec: OsoraSpec, *, base: BaseWeights | None = None, target_modules: list[str] | str | None = None
    ) -> Self:
        """The configuration for ``spec`` on this machine, with its targets in PEFT's terms."""
        return cls(**spec.model_dump(include=cls.shared()), base_weights=base, target_modules=target_modules)

    def spec(self, *, targets: Targets = "all-linear") -> OsoraSpec:
        """The same values as they are stored with an adapter; raises ``SpecError``."""
        return cast(OsoraSpec, self.parsed(targets))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but the base model's weights."""
        values: dict[str, Any] = super().to_dict()
        values.pop("base_weights", None)
        return values
