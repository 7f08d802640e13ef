"""Whether an engine fits this machine: asked before its model is loaded, not by the kernel's out-of-memory killer."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import structlog
import torch
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from api.settings import Settings
from uora.errors import UoraError
from uora.memory import available_bytes
from uora.models import LocalModel, pick_dtype
from uora.models.loading import load_config
from uora.models.sources import weight_files
from uora.serving.lanes import StateShape
from worker import memory

log = structlog.get_logger()


class DoesNotFitError(UoraError):
    """The engine needs more memory than there is."""

    code = "engine_does_not_fit"


@dataclass(frozen=True)
class Need:
    """Bytes that an engine needs: of weights, of the keys and values of its sequences, of adapters."""

    weights: int
    kv: int
    adapters: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.adapters


def check_fits(base: LocalModel, settings: Settings, device: torch.device | str) -> None:
    """Refuse a base model that this machine cannot serve as the settings say.

    Raises:
        DoesNotFitError: it needs more memory than is available.
        BaseModelError: its configuration or weights cannot be read.
    """
    dtype = pick_dtype(settings.dtype)
    need, available = estimate(base, settings, dtype), _available(torch.device(device))
    if need.total <= available:
        return
    message = (
        f"The base model {base.name!r} needs {_gib(need.total)}: {_gib(need.weights)} of weights in "
        f"{str(dtype).removeprefix('torch.')}, {_gib(need.kv)} of keys and values "
        f"(UORA_ENGINE_KV_TOKENS={settings.engine_kv_tokens}) and {_gib(need.adapters)} of adapters "
        f"(UORA_ENGINE_ADAPTER_MEMORY={settings.engine_adapter_memory}). Found {_gib(available)} available on "
        f"{device}. Lower these two settings{_or_bfloat16(dtype)}, serve fewer or smaller base models here, or take a "
        "machine with more memory."
    )
    log.error("engine_does_not_fit", reason=message)
    raise DoesNotFitError(message)


def estimate(base: LocalModel, settings: Settings, dtype: torch.dtype) -> Need:
    """What serving takes, without the process itself and the activations of a step."""
    config = load_config(base)
    # A model that only reads keeps nothing of its tokens.
    per_token = StateShape.of(config).bytes_per_token(dtype) if _writes(config) else 0
    return Need(
        weights=_weights(base) * dtype.itemsize,
        kv=per_token * settings.engine_kv_tokens,
        adapters=settings.engine_adapter_memory,
    )


def _available(device: torch.device) -> int:
    return available_bytes(device) if device.type == "cuda" else memory.available_bytes()


def _weights(base: LocalModel) -> int:
    """Numbers in the model's files, of which the headers alone are read."""
    names = weight_files(base.directory)
    count = 0
    for file in set(names.values()):
        with safe_open(file, framework="pt") as weights:
            count += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys() if name in names)  # noqa: SIM118
    return count


def _writes(config: PretrainedConfig) -> bool:
    writer = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return writer is not None and writer in (config.architectures or [writer])


def _or_bfloat16(dtype: torch.dtype) -> str:
    return ", serve in half the size (UORA_DTYPE=bfloat16)" if dtype == torch.float32 else ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
