"""UoraConfig: the method's parameters as PEFT carries them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig

from uora.delta import Family
from uora.errors import SpecError
from uora.reinit import ReinitRule
from uora.spec import AdapterSpec

_DEFAULTS = AdapterSpec()
#: What a spec and a configuration both hold, under the same names.
_SHARED = set(AdapterSpec.model_fields) - {"method", "targets"}


@dataclass
class UoraConfig(PeftConfig):
    """UORA for ``peft.get_peft_model``. Each default is that of ``uora.spec.AdapterSpec``.

    Attributes:
        r: rank; may exceed a layer's sizes.
        target_modules: ``"all-linear"``, a regular expression, or the last parts of module names; None takes the
            model family's query and value projections.
        alpha: share of the old row that a hit leaves.
        tau: ``|d[i]| < tau`` counts towards a hit.
        count_k: every ``count_k``-th count is a hit.
        d_initial: start of d; b starts at 0, so that dW = 0.
        dropout: on the layer's input, in training.
        frame_seed: names the frames.
        frame_fingerprint: probes of the frames trained on; filled in at injection, checked at loading.
        frame_cache_dir: disk cache of frames; a setting of the machine, never saved.
    """

    r: int = field(default=_DEFAULTS.r, metadata={"help": "Rank."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules to leave out."})
    alpha: float = field(default=_DEFAULTS.alpha, metadata={"help": "Share of the old row that a hit leaves."})
    tau: float = field(default=_DEFAULTS.tau, metadata={"help": "|d| below which an index counts."})
    count_k: int = field(default=_DEFAULTS.count_k, metadata={"help": "Every count_k-th count is a hit."})
    d_initial: float = field(default=_DEFAULTS.d_initial, metadata={"help": "Start of d."})
    dropout: float = field(default=_DEFAULTS.dropout, metadata={"help": "Dropout on the layer's input."})
    frame_seed: int = field(default=_DEFAULTS.frame_seed, metadata={"help": "Names the frames."})
    frame_fingerprint: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "Probes of the frames trained on."}
    )
    frame_cache_dir: str | None = field(default=None, metadata={"help": "Disk cache of frames."})
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
    def of(cls, spec: AdapterSpec, *, target_modules: list[str] | str | None, frame_cache_dir: Path | None) -> Self:
        """The configuration for ``spec`` on this machine, with its targets in PEFT's terms."""
        return cls(
            **spec.model_dump(include=_SHARED),
            target_modules=target_modules,
            frame_cache_dir=str(frame_cache_dir) if frame_cache_dir else None,
        )

    def spec(self, *, targets: tuple[str, ...]) -> AdapterSpec:
        """The same values as they are stored with an adapter."""
        return AdapterSpec(targets=targets, **{name: getattr(self, name) for name in _SHARED})

    def __post_init__(self) -> None:
        super().__post_init__()
        # The member is added at registration, so it cannot be named before this package is imported.
        from peft.utils import PeftType

        self.peft_type = PeftType["UORA"]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        self._check()

    def _check(self) -> None:
        if self.r < 1:
            raise SpecError(f"r is {self.r}, expected at least 1.", param="r")
        if not 0.0 <= self.alpha <= 1.0:
            raise SpecError(f"alpha is {self.alpha}, expected 0 to 1.", param="alpha")
        if self.count_k < 1:
            raise SpecError(f"count_k is {self.count_k}, expected at least 1.", param="count_k")
        if self.layers_pattern and self.layers_to_transform is None:
            raise SpecError("layers_pattern needs layers_to_transform.", param="layers_pattern")

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but this machine's cache folder."""
        values: dict[str, Any] = super().to_dict()
        values.pop("frame_cache_dir", None)
        return values

    @property
    def family(self) -> Family:
        """The frames this adapter uses."""
        return Family(self.frame_seed, self.r, Path(self.frame_cache_dir) if self.frame_cache_dir else None)

    @property
    def reinit_rule(self) -> ReinitRule:
        """When an index is hit, and what a hit leaves."""
        return ReinitRule(alpha=self.alpha, tau=self.tau, count_k=self.count_k)
