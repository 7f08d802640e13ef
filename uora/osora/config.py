"""OsoraConfig: the method's parameters as PEFT carries them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self, cast

from peft import PeftConfig

from uora.errors import SpecError
from uora.spec import OsoraSpec, Targets, parse_adapter
from uora.svd import BaseWeights

_DEFAULTS = OsoraSpec()
#: What a spec and a configuration both hold, under the same names.
_SHARED = set(OsoraSpec.model_fields) - {"method", "targets"}


@dataclass
class OsoraConfig(PeftConfig):
    """OSoRA for ``peft.get_peft_model``. Defaults and bounds are those of ``uora.spec.OsoraSpec``.

    Attributes:
        r: rank; beyond a layer's smaller side it changes nothing.
        target_modules: ``"all-linear"``, a regular expression, or the last parts of module names; None takes the
            model family's query and value projections.
        dropout: on the layer's input, in training.
        svd_fingerprint: probes of the singular factors trained on; filled in at injection, checked at loading.
        base_weights: where the factors come from; None for the weights of the model itself. A setting of the machine,
            never saved.
    """

    r: int = field(default=_DEFAULTS.r, metadata={"help": "Rank."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules to leave out."})
    dropout: float = field(default=_DEFAULTS.dropout, metadata={"help": "Dropout on the layer's input."})
    svd_fingerprint: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "Probes of the singular factors trained on."}
    )
    base_weights: BaseWeights | None = field(
        default=None, repr=False, metadata={"help": "Where the singular factors come from."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save, such as a classifier's head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indexes of the only layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, with layers_to_transform."}
    )

    @classmethod
    def of(
        cls, spec: OsoraSpec, *, base: BaseWeights | None = None, target_modules: list[str] | str | None = None
    ) -> Self:
        """The configuration for ``spec`` on this machine, with its targets in PEFT's terms."""
        return cls(**spec.model_dump(include=_SHARED), base_weights=base, target_modules=target_modules)

    def spec(self, *, targets: Targets = "all-linear") -> OsoraSpec:
        """The same values as they are stored with an adapter.

        Raises:
            SpecError: a value that cannot be used.
        """
        shared = {name: getattr(self, name) for name in _SHARED}
        return cast(OsoraSpec, parse_adapter({"method": "osora", "targets": targets} | shared))

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # The member is added at registration, so it cannot be named before this package is imported.
        from peft.utils import PeftType

        self.peft_type = PeftType["OSORA"]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        self.spec()  # raises what cannot be used
        if self.layers_pattern and self.layers_to_transform is None:
            raise SpecError("layers_pattern needs layers_to_transform.", param="layers_pattern")

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but the base model's weights."""
        values: dict[str, Any] = super().to_dict()
        values.pop("base_weights", None)
        return values
