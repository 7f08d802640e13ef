"""A base model in memory, and what turns rows into its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from uora.errors import BaseModelError
from uora.models.inputs import ImageInputs, TextInputs
from uora.models.logs import last_line, quiet
from uora.models.mapped import copy_folder, keep_copy
from uora.models.sources import LocalModel
from uora.quantised import keep_weight_layout
from uora.spec import Task

_MODEL_CLASSES: dict[Task, Any] = {
    "chat": AutoModelForCausalLM,
    "completion": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
#: What transformers raises for a directory that it cannot use; ImportError for a library that a model needs.
_UNUSABLE = (OSError, ValueError, KeyError, ImportError)


def load_model(
    local: LocalModel,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    task: Task = "chat",
    labels: Sequence[str] = (),
    seed: int = 0,
    copies_in: Path | None = None,
) -> PreTrainedModel:
    """The base model, frozen and in evaluation mode; for a task that needs one, with a head that can be trained.

    The head (see `head_modules`) is what follows the base model proper, and its pooler if the weights' files lack it.
    It is the only part that requires gradients, and it is float32 whatever ``dtype`` is. Its linear layers have a bias.
    On the CPU, weights that are stored as ``dtype`` stay in their memory-mapped file, whose pages processes share.
    For a model of text on the CPU, ``copies_in`` has such a file made of weights that are stored in another dtype.

    Args:
        local: what `fetch` returned.
        dtype: of the weights in memory.
        device: where they go.
        task: what the model is for.
        labels: the classes; none for a regression, which has one output, or where adapters bring their own heads.
        seed: of a head's weights.
        copies_in: a cache directory (``uora.models.mapped``); None keeps a private copy of converted weights.

    Raises:
        BaseModelError: the directory's weights or configuration cannot be read, or are no model for this task.
    """
    options = {} if task in ("chat", "completion") else {"num_labels": len(labels) or 1}
    if options or torch.device(device).type != "cpu":
        copies_in = None
    copy = copies_in and copy_folder(local, dtype, cache_dir=copies_in)
    # A copy belongs to weights, which models with different configurations may have in common.
    of_copy = {"config": load_config(local)} if copy and copy.is_dir() else {}
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model, report = _MODEL_CLASSES[task].from_pretrained(
                copy if of_copy else local.directory,
                dtype=dtype,
                local_files_only=True,
                ignore_mismatched_sizes=bool(options),  # a classifier of other classes
                output_loading_info=True,
                **options,
                **of_copy,
            )
    except _UNUSABLE as error:
        raise BaseModelError(f"The base model {local.name!r} cannot be loaded: {last_line(error)}") from error
    model = cast(PreTrainedModel, model.to(device).requires_grad_(False).eval())
    keep_weight_layout(model)
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if task in ("classification", "regression"):
        model.config.get_text_config().pad_token_id = _pad_token(model.config)
    if options:
        _make_head(model, new, name=local.name)
    elif new:
        raise BaseModelError(
            f"The base model {local.name!r} lacks {len(new)} weights of a language model, the first is {min(new)}. "
            f"For the task {task} use a model that generates text."
        )
    if copies_in and not of_copy:
        keep_copy(model, local, cache_dir=copies_in)
    return model


def load_classifier_over(local: LocalModel, parameters: Mapping[str, Tensor]) -> PreTrainedModel:
    """A classifier of texts whose parameters, but for its head's, are those of a text model in memory.

    Args:
        local: the base model of both.
        parameters: the text model's, by their names, as `load_model` returned it.

    Raises:
        BaseModelError: there is no classifier of its kind.
    """
    config = load_config(local)
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise BaseModelError(f"The base model {local.name!r} is a {config.model_type}, which classifies no texts.")
    config.num_labels = 1  # adapters bring their own heads
    inside = f"{kind.base_model_prefix}."
    weights = {name: tensor.detach() for name, tensor in parameters.items() if name.startswith(inside)}
    some = next(iter(weights.values()))
    with quiet(), torch.random.fork_rng():
        classifier, report = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=some.dtype, output_loading_info=True
        )
    classifier = cast(PreTrainedModel, classifier.to(some.device).requires_grad_(False).eval())
    keep_weight_layout(classifier)
    classifier.config.get_text_config().pad_token_id = _pad_token(config)
    _make_head(classifier, set(report["missing_keys"]), name=local.name)
    return classifier


def served_tasks(local: LocalModel) -> frozenset[Task]:
    """What the base model can be served for, by its configuration.

    Raises:
        BaseModelError: the directory's configuration cannot be read.
    """
    config = load_config(local)
    writer = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    found: set[Task] = set()
    if writer is not None and writer in (config.architectures or [writer]):
        found |= {"chat", "completion"}
    if config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        found |= {"classification", "regression"}
    if config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        found |= {"image-classification"}
    return frozenset(found)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of a loaded model's modules that are its head: those whose own parameters can be trained."""
    return tuple(
        name
        for name, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    )


def _make_head(model: PreTrainedModel, new: set[str], *, name: str) -> None:
    """Let what stands outside of the base model proper, and its pooler if that is new, be trained, in float32."""
    if model.base_model is model:
        raise BaseModelError(f"The base model {name!r} is a {type(model).__name__}, whose head is no part of its own.")
    inside = f"{model.base_model_prefix}."
    lost = sorted(weight for weight in new if weight.startswith(inside) and not weight.startswith(f"{inside}pooler."))
    if lost:
        raise BaseModelError(
            f"The base model {name!r} lacks {len(lost)} weights, the first is {lost[0]}. Only a head can be trained "
            "anew; use a model whose files hold all the rest."
        )
    owners = {
        parameter.rpartition(".")[0]
        for parameter, _ in model.named_parameters()
        if parameter in new or not parameter.startswith(inside)
    }
    for owner in owners:
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear) and "bias" not in dict(module.named_parameters()):
            # Decoders' heads have none, but a regression's mean needs a place.
            module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0]))
        module.float().requires_grad_(True)
        module.register_forward_pre_hook(_to_float32)


def _to_float32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def load_skeleton(local: LocalModel, *, task: Task = "chat") -> PreTrainedModel:
    """The base model's modules without their weights (on torch's meta device), for their sizes; without a head.

    Raises:
        BaseModelError: the directory's configuration cannot be read, or is of no model for the task.
    """
    try:
        with torch.device("meta"):
            # Their methods have no types.
            auto: Any = AutoModelForCausalLM if task in ("chat", "completion") else AutoModel
            model = auto.from_config(load_config(local))
    except _UNUSABLE as error:
        raise BaseModelError(f"The base model {local.name!r} cannot be built: {last_line(error)}") from error
    return cast(PreTrainedModel, model)


@lru_cache(maxsize=8)
def load_tokenizer(local: LocalModel) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with its chat template if it has one; kept, since it takes long to read.

    Raises:
        BaseModelError: the directory's tokenizer cannot be read.
    """
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(local.directory, local_files_only=True))
    except _UNUSABLE as error:
        raise BaseModelError(f"The tokenizer of {local.name!r} cannot be loaded: {last_line(error)}") from error


def load_text_inputs(local: LocalModel) -> TextInputs:
    """How the base model takes texts to classify.

    Raises:
        BaseModelError: the directory's tokenizer or configuration cannot be read.
    """
    tokenizer = load_tokenizer(local)
    config = load_config(local)
    return TextInputs(
        tokenizer=tokenizer,
        # Some models number positions from 2: the tokenizer knows how many are left.
        max_tokens=min(context_tokens(local), tokenizer.model_max_length),
        pad_token=_pad_token(config),
        with_segments=getattr(config, "type_vocab_size", 0) > 1,
    )


def load_image_inputs(local: LocalModel) -> ImageInputs:
    """How the base model takes images.

    Raises:
        BaseModelError: the directory has no image processor, or Pillow is not installed.
    """
    try:
        # Pillow's resizing on every machine, whether or not torchvision's, which rounds otherwise, is there.
        auto: Any = AutoImageProcessor  # its methods have no types
        processor = auto.from_pretrained(local.directory, local_files_only=True, backend="pil")
    except _UNUSABLE as error:
        raise BaseModelError(
            f"The image processor of {local.name!r} cannot be loaded: {last_line(error)}. Expected a model of images "
            "with its preprocessor_config.json."
        ) from error
    return ImageInputs(processor)


def context_tokens(local: LocalModel) -> int:
    """The longest sequence that the base model takes, prompt and answer, in tokens.

    Raises:
        BaseModelError: its configuration does not say.
    """
    try:
        return int(load_config(local).get_text_config().max_position_embeddings)
    except AttributeError as error:
        raise BaseModelError(
            f"The configuration of {local.name!r} does not give max_position_embeddings: {last_line(error)}"
        ) from error


def load_config(local: LocalModel) -> PretrainedConfig:
    """The base model's configuration.

    Raises:
        BaseModelError: the directory's configuration cannot be read.
    """
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(local.directory, local_files_only=True))
    except _UNUSABLE as error:
        raise BaseModelError(f"The configuration of {local.name!r} cannot be read: {last_line(error)}") from error


def _pad_token(config: PretrainedConfig) -> int:
    """The model's padding token; the one that ends a text where it has none, as decoders often do."""
    text = config.get_text_config()
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    return next((token for token in (text.pad_token_id, *ends) if token is not None and token >= 0), 0)


def pick_dtype(setting: str) -> torch.dtype:
    """The dtype of the base model's weights.

    Args:
        setting: ``bfloat16``, ``float32``, or ``auto``: bfloat16 where the processor computes in it, else
            float32 (emulated bfloat16 is slower than float32).

    Raises:
        BaseModelError: another setting.
    """
    match setting:
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "auto":
            return torch.bfloat16 if _has_bfloat16() else torch.float32
    raise BaseModelError(f"The dtype is {setting!r}; expected auto, bfloat16 or float32.", param="dtype")


def _has_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
