"""Base models: from where they come, to a folder on this machine, to memory."""

from uora.models.inputs import Batch, Features, ImageInputs, ModelInputs, TextInputs
from uora.models.loading import (
    context_tokens,
    head_modules,
    load_classifier_over,
    load_image_inputs,
    load_model,
    load_skeleton,
    load_text_inputs,
    load_tokenizer,
    pick_dtype,
    served_tasks,
)
from uora.models.sources import (
    KNOWN_MODELS,
    HubSource,
    LocalModel,
    WheelDirectorySource,
    WheelSource,
    fetch,
    weights_digest,
)

__all__ = [
    "KNOWN_MODELS",
    "Batch",
    "Features",
    "HubSource",
    "ImageInputs",
    "LocalModel",
    "ModelInputs",
    "TextInputs",
    "WheelDirectorySource",
    "WheelSource",
    "context_tokens",
    "fetch",
    "head_modules",
    "load_classifier_over",
    "load_image_inputs",
    "load_model",
    "load_skeleton",
    "load_text_inputs",
    "load_tokenizer",
    "pick_dtype",
    "served_tasks",
    "weights_digest",
]
