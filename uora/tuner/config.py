"""UoraConfig: the method's parameters as PEFT carries them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from peft import PeftConfig

from uora.delta import Family
from uora.errors import SpecError
from uora.spec import AdapterSpec, FrameInit, OsoraSpec, Targets, UoraSpec, parse_adapter

_DEFAULTS = UoraSpec()


@dataclass
class AdditiveConfig(PeftConfig):
    """What the configurations of our tuners have in common.

    Attributes:
        r: rank.
        target_modules: ``"all-linear"``, a regular expression, or the last parts of module names; None takes the
            model family's query and value projections.
        dropout: on the layer's input, in training.
    """

    spec_cls: ClassVar[type[UoraSpec | OsoraSpec]]

    r: int = field(default=64, metadata={"help": "Rank."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules to leave out."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the layer's input."})
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
    def shared(cls) -> set[str]:
        """What a spec and a configuration both hold, under the same names."""
        return set(cls.spec_cls.model_fields) - {"method", "targets"}

    def parsed(self, targets: Targets) -> AdapterSpec:
        """The same values as they are stored with an adapter.

        Raises:
            SpecError: a value that cannot be used.
        """
        values = {name: getattr(self, name) for name in self.shared()}
        return parse_adapter({"method": self.spec_cls.model_fields["method"].default, "targets": targets} | values)

    def __post_init__(self) -> None:
        super().__post_init__()
        # The member is added at registration, so it cannot be named before this package is imported.
        from peft.utils import PeftType

        self.peft_type = PeftType[self.parsed("all-linear").method.upper()]  # raises what cannot be used
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise SpecError("layers_pattern needs layers_to_transform.", param="layers_pattern")


@dataclass
class UoraConfig(AdditiveConfig):
    """UORA for ``peft.get_peft_model``. Defaults and bounds are those of ``uora.spec.UoraSpec``.

    Attributes:
        r: rank; may exceed a layer's sizes.
        alpha: share of the old row that a hit leaves.
        tau: ``|d[i]| < tau`` counts towards a hit.
        count_k: every ``count_k``-th count is a hit.
        d_initial: start of d; b starts at 0, so that dW = 0.
        frame_seed: names the frames.
        init: how the frames are drawn.
        reinit_scope: whether a hit changes an index for all layers or for its own.
        dynamic_alpha: let a layer's alpha decay with its counts on an index, ``max(0.5, alpha - 0.05 count)``.
        tau_quantile: count this share of all d, those of the smallest magnitude, instead of those below ``tau``.
        reinit_interval: optimizer steps between two such choices.
        frame_fingerprint: probes of the frames trained on; filled in at injection, checked at loading.
        frame_cache_dir: disk cache of frames; a setting of the machine, never saved.
    """

    spec_cls = UoraSpec

    alpha: float = field(default=_DEFAULTS.alpha, metadata={"help": "Share of the old row that a hit leaves."})
    tau: float = field(default=_DEFAULTS.tau, metadata={"help": "|d| below which an index counts."})
    count_k: int = field(default=_DEFAULTS.count_k, metadata={"help": "Every count_k-th count is a hit."})
    d_initial: float = field(default=_DEFAULTS.d_initial, metadata={"help": "Start of d."})
    frame_seed: int = field(default=_DEFAULTS.frame_seed, metadata={"help": "Names the frames."})
    init: FrameInit = field(default=_DEFAULTS.init, metadata={"help": "How the frames are drawn."})
    reinit_scope: Literal["shared", "layer"] = field(
        default=_DEFAULTS.reinit_scope, metadata={"help": "Whether a hit changes the frames of all layers or of one."}
    )
    dynamic_alpha: bool = field(default=_DEFAULTS.dynamic_alpha, metadata={"help": "Let alpha decay with the counts."})
    tau_quantile: float | None = field(
        default=_DEFAULTS.tau_quantile, metadata={"help": "Share of all d that counts, instead of tau."}
    )
    reinit_interval: int | None = field(
        default=_DEFAULTS.reinit_interval, metadata={"help": "Optimizer steps between two choices of tau_quantile."}
    )
    frame_fingerprint: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "Probes of the frames trained on."}
    )
    frame_cache_dir: str | None = field(default=None, metadata={"help": "Disk cache of frames."})

    @classmethod
    def of(cls, spec: UoraSpec, *, target_modules: list[str] | str | None, frame_cache_dir: Path | None) -> Self:
        """The configuration for ``spec`` on this machine, with its targets in PEFT's terms."""
        return cls(
            **spec.model_dump(include=cls.shared()),
            target_modules=target_modules,
            frame_cache_dir=str(frame_cache_dir) if frame_cache_dir else None,
        )

    def spec(self, *, targets: Targets = "all-linear") -> UoraSpec:
        """The same values as they are stored with an adapter; raises ``SpecError``."""
        return cast(UoraSpec, self.parsed(targets))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but this machine's cache folder."""
        values: dict[str, Any] = super().to_dict()
        values.pop("frame_cache_dir", None)
        return values

    @property
    def family(self) -> Family:
        """The frames this adapter uses."""
        cache_dir = Path(self.frame_cache_dir) if self.frame_cache_dir else None
        return Family(self.frame_seed, self.r, cache_dir, self.init)
