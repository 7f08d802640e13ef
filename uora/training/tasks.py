"""What differs between tasks: examples of rows, batches of examples, pieces of batches, and the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from uora.data import (
    ChatRow,
    CompletionRow,
    Dataset,
    Example,
    ImageRow,
    Labels,
    Overlong,
    Row,
    Scale,
    TextRow,
    encode_chat,
    encode_completion,
    encode_rows,
    fit,
    fit_length,
    template_sha256,
)
from uora.errors import DataError
from uora.models import (
    Batch,
    Features,
    ImageInputs,
    LocalModel,
    TextInputs,
    context_tokens,
    load_image_inputs,
    load_text_inputs,
    load_tokenizer,
)
from uora.spec import Task, TrainingOptions
from uora.training.batches import (
    MAX_IMAGES_AT_ONCE,
    MAX_TOKENS_AT_ONCE,
    Piece,
    collate,
    split,
    split_rows,
)
from uora.training.loss import (
    ClassLoss,
    LearnedTokenLoss,
    SquaredErrorLoss,
    TaskLoss,
)
from uora.training.passes import CausalPasses

#: How one batch goes through a model: in pieces of bounded size.
Splitter = Callable[[Batch], Iterator[Piece]]
ExampleT = TypeVar("ExampleT")


class TrainingTask(Protocol):
    """A task on one base model."""

    @property
    def loss(self) -> TaskLoss[Any]:
        """What is made small, with its meters."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the model's outputs; empty where there are none."""

    @property
    def chat_template_sha256(self) -> str | None:
        """Of the template that rendered the rows, if there is one."""

    @property
    def counts_tokens(self) -> bool:
        """Whether the examples are made of tokens."""

    def examples(self, dataset: Dataset[Row]) -> list[Any]:
        """Every row as an example, in order.

        Raises:
            DataError: a row does not fit the model or the task; names its line.
        """

    def length(self, example: Any) -> int:
        """The example's tokens; 0 if it has none."""

    def collate(self, examples: Sequence[Any]) -> Batch:
        """One batch, with ``labels``."""

    def splitter(self, model: PreTrainedModel, *, packing: bool) -> Splitter:
        """How batches go through this model; ``packing``: without padding, where the task and the model allow it."""

    def as_stored(self, model: PeftModel) -> AbstractContextManager[None]:
        """Within the context, the model answers as it is to answer for its users."""

    def take_stored(self, model: PeftModel) -> None:
        """Turn a model that answers for its users into one that learns."""


def training_task(
    task: Task, base: LocalModel, training: Dataset[Row], *, options: TrainingOptions | None = None
) -> TrainingTask:
    """The strategy of ``task`` for a base model and a training file, from which classes take their names.

    ``options`` say how long rows may be; None for the defaults.

    Raises:
        BaseModelError: the base model has no tokenizer or image processor for it.
        DataError: there are fewer than two classes.
    """
    options = options or TrainingOptions()
    match task:
        case "chat":
            tokenizer = load_tokenizer(base)
            return _Causal(
                lambda row: encode_chat(cast(ChatRow, row), tokenizer),
                max_tokens=_max_tokens(base, options),
                overlong=options.overlong,
                chat_template_sha256=template_sha256(tokenizer),
            )
        case "completion":
            tokenizer = load_tokenizer(base)
            return _Causal(
                lambda row: encode_completion(cast(CompletionRow, row), tokenizer),
                max_tokens=_max_tokens(base, options),
                overlong=options.overlong,
            )
        case "classification":
            return _Texts(load_text_inputs(base), ClassLoss(), options, _labels(training))
        case "regression":
            return _Texts(load_text_inputs(base), SquaredErrorLoss(scale := _scale(training)), options, scale=scale)
        case "image-classification":
            return _Images(load_image_inputs(base), _labels(training))


def _max_tokens(base: LocalModel, options: TrainingOptions) -> int:
    context = context_tokens(base)
    return context if options.max_length is None else min(context, options.max_length)


def _labels(training: Dataset[Row]) -> tuple[str, ...]:
    return Labels.of(cast(str, row.label) for row in cast(Dataset[TextRow | ImageRow], training).rows).names


def _scale(training: Dataset[Row]) -> Scale:
    return Scale.of([cast(float, row.label) for row in cast(Dataset[TextRow], training).rows])


@dataclass(frozen=True)
class _Causal:
    """A model that goes on with a text; only some tokens are learned."""

    encode: Callable[[Row], Example]
    max_tokens: int
    overlong: Overlong = "error"
    chat_template_sha256: str | None = None
    loss: LearnedTokenLoss = field(default_factory=LearnedTokenLoss)
    labels: tuple[str, ...] = ()
    counts_tokens: bool = True

    def examples(self, dataset: Dataset[Row]) -> list[Example]:
        encoded = encode_rows(dataset, self._example)
        return _some([example for example in encoded if example is not None], self.max_tokens)

    def _example(self, row: Row) -> Example | None:
        return fit(self.encode(row), max_length=self.max_tokens, overlong=self.overlong)

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def splitter(self, model: PreTrainedModel, *, packing: bool) -> Splitter:
        return CausalPasses.of(model, packing=packing).pieces

    def as_stored(self, model: PeftModel) -> AbstractContextManager[None]:
        return nullcontext()

    def take_stored(self, model: PeftModel) -> None:
        pass


def _some(examples: list[ExampleT], max_tokens: int) -> list[ExampleT]:
    """The examples that are left.

    Raises:
        DataError: none is (code ``example_too_long``).
    """
    if not examples:
        raise DataError(
            f"Every row is longer than {max_tokens} tokens, so none is left. Raise max_length, or set overlong to "
            "truncate.",
            code="example_too_long",
        )
    return examples


@dataclass(frozen=True)
class _TextExample:
    features: Features
    target: int | float


@dataclass(frozen=True)
class _Texts:
    """A class or a number for a text or a pair of texts."""

    inputs: TextInputs
    loss: ClassLoss | SquaredErrorLoss
    options: TrainingOptions
    labels: tuple[str, ...] = ()
    scale: Scale | None = None
    chat_template_sha256: None = None
    counts_tokens: bool = True

    def examples(self, dataset: Dataset[Row]) -> list[_TextExample]:
        encoded = encode_rows(cast(Dataset[TextRow], dataset), self._example)
        return _some([example for example in encoded if example is not None], self._max_tokens)

    def _example(self, row: TextRow) -> _TextExample | None:
        target = Labels(self.labels).index(row.label) if isinstance(row.label, str) else row.label
        features = self.inputs.of_any_length().encode(row.text, row.text_pair)
        tokens = len(features["input_ids"])
        kept = fit_length(tokens, max_length=self._max_tokens, overlong=self.options.overlong)
        if kept is None:
            return None
        if kept < tokens:
            features = self.inputs.encode(row.text, row.text_pair, cut_to=kept)
        return _TextExample(features, target)

    @property
    def _max_tokens(self) -> int:
        return min(self.inputs.max_tokens, self.options.max_length or self.inputs.max_tokens)

    def length(self, example: _TextExample) -> int:
        return len(example.features["input_ids"])

    def collate(self, examples: Sequence[_TextExample]) -> Batch:
        targets = torch.tensor([example.target for example in examples])
        return self.inputs.collate([example.features for example in examples]) | {"labels": targets}

    def splitter(self, model: PreTrainedModel, *, packing: bool) -> Splitter:
        return lambda batch: split(batch, max_tokens=MAX_TOKENS_AT_ONCE[batch["labels"].device.type])

    def as_stored(self, model: PeftModel) -> AbstractContextManager[None]:
        return nullcontext() if self.scale is None else _rescaled(_output_layer(model), self.scale)

    @torch.no_grad()
    def take_stored(self, model: PeftModel) -> None:
        if self.scale is not None:
            layer = _output_layer(model)
            layer.weight.div_(self.scale.deviation)
            layer.bias.sub_(self.scale.mean).div_(self.scale.deviation)


def _output_layer(model: PeftModel) -> nn.Linear:
    """The layer of the head that comes last."""
    wrapped = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return cast(nn.Linear, wrapped[-1].modules_to_save["default"])


@contextmanager
def _rescaled(layer: nn.Linear, scale: Scale) -> Iterator[None]:
    """Let a layer give numbers where it has learned to give them as z; afterwards it is as it was, bit for bit."""
    learned = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.weight.mul_(scale.deviation)
        layer.bias.mul_(scale.deviation).add_(scale.mean)
    try:
        yield
    finally:
        layer.load_state_dict(learned)


@dataclass(frozen=True)
class _ImageExample:
    image: bytes
    target: int


@dataclass(frozen=True)
class _Images:
    """A class for an image."""

    inputs: ImageInputs
    labels: tuple[str, ...]
    loss: ClassLoss = field(default_factory=ClassLoss)
    chat_template_sha256: None = None
    counts_tokens: bool = False

    def examples(self, dataset: Dataset[Row]) -> list[_ImageExample]:
        return list(encode_rows(cast(Dataset[ImageRow], dataset), self._example))

    def _example(self, row: ImageRow) -> _ImageExample:
        return _ImageExample(self.inputs.encode(row.image), Labels(self.labels).index(row.label))

    def length(self, example: _ImageExample) -> int:
        return 0

    def collate(self, examples: Sequence[_ImageExample]) -> Batch:
        targets = torch.tensor([example.target for example in examples])
        return self.inputs.collate([example.image for example in examples]) | {"labels": targets}

    def splitter(self, model: PreTrainedModel, *, packing: bool) -> Splitter:
        return lambda batch: split_rows(batch, max_rows=MAX_IMAGES_AT_ONCE[batch["labels"].device.type])

    def as_stored(self, model: PeftModel) -> AbstractContextManager[None]:
        return nullcontext()

    def take_stored(self, model: PeftModel) -> None:
        pass
