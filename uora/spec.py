"""What to train, as values: parsed once, frozen, without torch.

``AdapterSpec`` is one of five methods' settings, told apart by ``method``. ``HyperparameterRequest`` is what a client
asks for, ``"auto"`` included; ``resolve`` turns it into the numbers that are run, once the number of examples is known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from uora.errors import RankError, SpecError, UnknownMethodError

Auto = Literal["auto"]
MethodName = Literal["uora", "vera", "lora", "olora", "osora"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
#: How the numbers of a frame are drawn (``uora.frames``).
FrameInit = Literal["orthogonal", "kaiming", "xavier", "uniform"]
#: What is learned: the answers of conversations; completions of prompts; a class or a number for a text or a pair of
#: texts; a class for an image.
Task = Literal["chat", "completion", "classification", "regression", "image-classification"]
TASKS: tuple[Task, ...] = get_args(Task)
Targets = Literal["all-linear", "q,v"] | Annotated[tuple[str, ...], Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _MethodSpec(_Frozen):
    """What every method has."""

    #: Learning rate of multiplier 1: between the best ones of docs/choosing.md, below those with which training falls
    #: apart on any of its data.
    base_learning_rate: ClassVar[float]

    #: Rank.
    r: int = Field(ge=1, le=4096)
    #: ``all-linear``; ``q,v``, the query and value projections; or the last parts of module names.
    targets: Targets = "all-linear"
    #: On the layer's input, in training.
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class UoraSpec(_MethodSpec):
    """UORA (arXiv 2505.20154; defaults of its author's code unless noted): b and d are trained, frames are frozen."""

    base_learning_rate: ClassVar[float] = 0.1

    method: Literal["uora"] = "uora"
    #: The reference code takes 256; 64 on all linear layers is what was measured here.
    r: int = Field(default=64, ge=1, le=4096)
    #: What a hit leaves of a frame's row: ``row = alpha row + (1 - alpha) target row``.
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    #: ``|d[i]| < tau`` counts towards a hit.
    tau: float = Field(default=1e-5, ge=0.0)
    #: Every ``count_k``-th count is a hit.
    count_k: int = Field(default=1, ge=1)
    d_initial: float = 0.1
    #: Names the frames. Adapters of one base model share them only if they have the same seed.
    frame_seed: int = Field(default=0, ge=0, lt=2**63)
    #: Whether a hit changes an index of the frames for all layers (the reference) or for the layer that was hit.
    reinit_scope: Literal["shared", "layer"] = "shared"
    #: Let a layer's alpha decay with its counts c on the index: ``max(0.5, alpha - 0.05 c)``.
    dynamic_alpha: bool = False
    #: An extension: hit this share of all d, those of the smallest magnitude, instead of those below ``tau``.
    tau_quantile: float | None = Field(default=None, gt=0.0, lt=1.0)
    #: Optimizer steps between two such hits.
    reinit_interval: int | None = Field(default=None, ge=1)
    #: How the frames are drawn; other than orthogonal is for comparison.
    init: FrameInit = "orthogonal"

    @model_validator(mode="after")
    def _quantile_has_interval(self) -> UoraSpec:
        if (self.tau_quantile is None) != (self.reinit_interval is None):
            raise ValueError("tau_quantile and reinit_interval go together; give both or neither")
        return self


class VeraSpec(_MethodSpec):
    """VeRA (arXiv 2310.11454): b and d over frozen Kaiming-uniform matrices."""

    base_learning_rate: ClassVar[float] = 0.05

    method: Literal["vera"] = "vera"
    r: int = Field(default=256, ge=1, le=4096)
    d_initial: float = 0.1
    #: Names the matrices.
    frame_seed: int = Field(default=0, ge=0, lt=2**63)


class LoraSpec(_MethodSpec):
    """LoRA (arXiv 2106.09685): a trained pair, scaled by ``lora_alpha / r``."""

    base_learning_rate: ClassVar[float] = 0.003

    method: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=4096)
    lora_alpha: float = Field(default=16.0, gt=0.0)


class OloraSpec(_MethodSpec):
    """OLoRA (arXiv 2406.01775): LoRA that starts from the QR factors of the weight."""

    base_learning_rate: ClassVar[float] = 0.0005

    method: Literal["olora"] = "olora"
    r: int = Field(default=8, ge=1, le=4096)
    lora_alpha: float = Field(default=16.0, gt=0.0)


class OsoraSpec(_MethodSpec):
    """OSoRA (arXiv 2505.14350): singular values and output scales over the weight's singular vectors."""

    base_learning_rate: ClassVar[float] = 0.03

    method: Literal["osora"] = "osora"
    r: int = Field(default=64, ge=1, le=4096)


AdapterSpec = Annotated[UoraSpec | VeraSpec | LoraSpec | OloraSpec | OsoraSpec, Field(discriminator="method")]
_adapter_specs: TypeAdapter[AdapterSpec] = TypeAdapter(AdapterSpec)


def default_method(values: Any) -> Any:
    """The values of an adapter's settings, with the method that is meant where they name none."""
    return {"method": "uora", **values} if isinstance(values, Mapping) else values


def parse_adapter(values: Mapping[str, Any]) -> AdapterSpec:
    """An adapter's settings from plain values, as they are stored with a job.

    Raises:
        UnknownMethodError: a method that is none of `METHODS`.
        RankError: a rank that no method takes.
        SpecError: any other setting that cannot be used.
    """
    values = default_method(values)
    method = values["method"]
    if method not in METHODS:
        raise UnknownMethodError(f"Found the method {method!r}; expected one of {', '.join(METHODS)}.")
    try:
        return _adapter_specs.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])  # the first part is the method
        kind = RankError if name == "r" else SpecError
        text = f"Method {method}, {name or 'settings'}: found {first['input']!r}; {first['msg']}."
        raise kind(text, param=name or None) from error


class HyperparameterRequest(_Frozen):
    """Hyperparameters as OpenAI's client sends them."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=1000.0)] = "auto"


class Hyperparameters(_Frozen):
    """Hyperparameters as they are run."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class TrainingOptions(_Frozen):
    """How to train, beyond OpenAI's hyperparameters. Names and meanings are those of transformers and TRL."""

    #: Tokens of a row at most; None for the base model's context.
    max_length: int | None = Field(default=None, ge=8)
    #: What happens to a longer row: the file is refused, the row is cut at its end, or left out.
    overlong: Literal["error", "truncate", "drop"] = "error"
    #: Whether the rows of a batch go through the model end to end, without padding; attention stays within a row.
    packing: bool = True
    #: Batches whose gradients are added before the optimizer steps.
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=1024)
    #: Norm to which the gradient is cut, transformers' default; 0 for not at all.
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    #: Course of the learning rate after the warm-up.
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    #: Share of the steps in which the learning rate rises from 0.
    warmup_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    #: AdamW's.
    weight_decay: float = Field(default=0.0, ge=0.0)
    #: Whether activations are computed again in the backward pass instead of kept; ``auto`` does it for long rows.
    gradient_checkpointing: Auto | bool = "auto"
    #: Peak learning rate of a classifier's head; None for a default times the learning rate multiplier.
    head_learning_rate: float | None = Field(default=None, gt=0.0, le=100.0)
    #: Optimizer steps between two evaluations; None for one after each epoch, at most ten in all.
    eval_steps: int | None = Field(default=None, ge=1)
    #: Optimizer steps between two saves of the state that a lost run goes on from.
    save_steps: int = Field(default=20, ge=1)
    #: Evaluations in a row without a better validation loss after which the run ends; None for never.
    early_stopping_patience: int | None = Field(default=None, ge=1)
    #: How much lower a validation loss must be to be better.
    early_stopping_min_delta: float = Field(default=0.0, ge=0.0)
    #: Whether the result is the adapter of the lowest validation loss instead of the last one.
    load_best_model_at_end: bool = False

    @property
    def needs_validation(self) -> bool:
        """Whether the run cannot do without a validation file."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None


class TrainingSpec(_Frozen):
    """One training run."""

    adapter: AdapterSpec
    task: Task = "chat"
    hyperparameters: Hyperparameters
    options: TrainingOptions = TrainingOptions()
    #: Peak learning rate.
    learning_rate: float
    seed: int

    def total_steps(self, n_examples: int) -> int:
        """Optimizer steps of the whole run over ``n_examples`` rows, unless it stops early."""
        batches = math.ceil(n_examples / self.hyperparameters.batch_size)
        return math.ceil(batches / self.options.gradient_accumulation_steps) * self.hyperparameters.n_epochs


def cotraining_key(spec: TrainingSpec) -> str | None:
    """Runs of one base model with the same key can share their forward and backward passes; None for not at all.

    They are causal, packed, and their adapters have the same shapes over the same frames or singular vectors. Dropout
    draws from a generator of the process, which no two runs could share and stay as they are alone.
    """
    adapter, options = spec.adapter, spec.options
    together = (
        isinstance(adapter, UoraSpec | OsoraSpec)
        and spec.task in ("chat", "completion")
        and adapter.dropout == 0.0
        and options.packing
        and options.gradient_checkpointing is not True
    )
    if not together:
        return None
    shape = adapter.model_dump_json(include={"method", "r", "targets", "frame_seed", "init"})
    return hashlib.sha256(shape.encode()).hexdigest()[:16]


def resolve(
    request: HyperparameterRequest,
    *,
    adapter: AdapterSpec,
    learning_rate: float | None,
    seed: int,
    n_examples: int,
    task: Task = "chat",
    options: TrainingOptions | None = None,
) -> TrainingSpec:
    """Replace every ``"auto"`` by a number that suits ``n_examples`` training rows.

    Args:
        request: what the client asked for.
        adapter: the adapter to train.
        learning_rate: an absolute rate that replaces the method's before the multiplier; None for the method's.
        seed: order of the rows, dropout.
        n_examples: rows of the training file.
        task: what to learn.
        options: how; None for the defaults.
    """
    batch_size = max(1, min(16, n_examples // 8)) if request.batch_size == "auto" else request.batch_size
    # "auto" makes about 60 steps, and at most 10 epochs.
    auto_epochs = max(1, min(10, round(60 * batch_size / n_examples)))
    n_epochs = auto_epochs if request.n_epochs == "auto" else request.n_epochs
    multiplier = 1.0 if request.learning_rate_multiplier == "auto" else request.learning_rate_multiplier
    return TrainingSpec(
        adapter=adapter,
        task=task,
        hyperparameters=Hyperparameters(n_epochs=n_epochs, batch_size=batch_size, learning_rate_multiplier=multiplier),
        options=options or TrainingOptions(),
        learning_rate=(adapter.base_learning_rate if learning_rate is None else learning_rate) * multiplier,
        seed=seed,
    )
