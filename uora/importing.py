"""Adapters that stock PEFT has trained, LoRA and VeRA, to the stored form. Free of torch; nothing is ever unpickled.

VeRA's frozen matrices come from torch's generator and not from our frames, so a VeRA adapter becomes the LoRA that it
is: ``A = diag(d) A_shared[:, :in]``, ``B = diag(b) B_shared[:out]``, scale 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, deserialize

from uora import layout
from uora.artifact import Artifact, Manifest, Provenance, dumps
from uora.convert import Pair
from uora.errors import FormatError, ShapeError
from uora.layout import ModuleShape
from uora.spec import LoraSpec, Task

Float32 = NDArray[np.float32]

#: Settings that say how an adapter was made or is found, not what it computes. Every other one must be off.
_HARMLESS = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size",
        "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights",
    }
)  # fmt: skip
#: Beginnings of training that leave the base model's weights as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_OFF: tuple[Any, ...] = (None, False, "none", [], {})
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_VERA = re.compile(r"base_model\.model\.(.+)\.vera_lambda_([bd])")
_NUMBERS: dict[str, str] = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


@dataclass(frozen=True)
class PeftFolder:
    """``adapter_config.json`` and ``adapter_model.safetensors``."""

    config: bytes
    weights: bytes


class _Config(BaseModel):
    peft_type: Literal["LORA", "VERA"]
    task_type: str | None = None
    r: int = Field(ge=1, le=4096)
    lora_alpha: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True


def import_peft(
    folder: PeftFolder,
    *,
    modules: Sequence[ModuleShape],
    base_model: str,
    base_digest: str,
    chat_template_sha256: str | None,
    task: Task = "chat",
    max_bytes: int | None = None,
) -> bytes:
    """The stored form of a PEFT adapter.

    Args:
        folder: its files.
        modules: every linear layer of the base model, in the model's order.
        base_model: name of the base model that it is put on.
        base_digest: of that base model's weights.
        chat_template_sha256: of the template that conversations are written with; None for completions.
        task: what it answers, ``chat`` or ``completion``.
        max_bytes: of its numbers; None for any.

    Raises:
        FormatError: not such an adapter, or one that computes something else than LoRA or VeRA do.
        ShapeError: it does not fit the base model, or is too large.
        NonFiniteError: it holds NaN or infinity.
    """
    config = _read_config(folder.config)
    tensors = _read_tensors(folder.weights)
    read = _vera_pairs if config.peft_type == "VERA" else _lora_pairs
    pairs = list(read(config, tensors, {module.name: module for module in modules}, max_bytes))
    spec = LoraSpec(r=config.r, lora_alpha=_alpha(config), targets=_targets(pairs))
    manifest = Manifest.of(
        Provenance(
            base_model=base_model,
            base_digest=base_digest,
            chat_template_sha256=chat_template_sha256 if task == "chat" else None,
            data_sha256=hashlib.sha256(folder.weights).hexdigest(),  # of what there is; the rows are not known
        ),
        adapter=spec,
        task=task,
        modules=tuple(pair.module for pair in pairs),
        fingerprint={},
    )
    parts = [{"lora_a": pair.a, "lora_b": pair.b} for pair in pairs]
    return dumps(Artifact(manifest, layout.pack(spec, parts)))


def _read_config(content: bytes) -> _Config:
    try:
        fields = json.loads(content)
        config = _Config.model_validate(fields)
    except (ValueError, ValidationError) as error:
        raise FormatError(f"adapter_config.json is not that of a PEFT LoRA or VeRA adapter: {error}") from error
    for name, value in fields.items():
        if name not in _HARMLESS and value not in _OFF:
            raise FormatError(
                f"adapter_config.json: found {name} = {value!r}, which changes what the adapter computes; expected it "
                "off. Train without it, or merge it into the base model."
            )
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise FormatError(
            f"adapter_config.json: init_lora_weights {config.init_lora_weights!r} changes the base model's weights. "
            "Save it with path_initial_model_for_weight_conversion (PEFT), which makes a plain LoRA of it."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise FormatError(f"adapter_config.json: found task_type {config.task_type!r}; expected CAUSAL_LM.")
    return config


def _read_tensors(content: bytes) -> dict[str, Float32]:
    try:
        stored = deserialize(content)  # type: ignore[no-untyped-call] # has no types
    except SafetensorError as error:
        raise FormatError(f"adapter_model.safetensors is no safetensors file ({error}).") from error
    return {name: _float32(name, tensor) for name, tensor in stored}


def _float32(name: str, tensor: Mapping[str, Any]) -> Float32:
    dtype, data, shape = tensor["dtype"], tensor["data"], tensor["shape"]
    if dtype == "BF16":  # numpy has none: the upper half of a float32
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape).astype(np.float32)
    if dtype not in _NUMBERS:
        raise FormatError(f"Tensor {name!r}: found {dtype}; expected one of BF16, {', '.join(sorted(_NUMBERS))}.")
    with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused with all others
        return np.frombuffer(data, _NUMBERS[dtype]).reshape(shape).astype(np.float32)


def _lora_pairs(
    config: _Config, tensors: Mapping[str, Float32], modules: Mapping[str, ModuleShape], max_bytes: int | None
) -> Iterator[Pair]:
    found = _by_module(tensors, _LORA)
    for module in _adapted(found, modules, r=config.r, max_bytes=max_bytes):
        a = _part(found, module, "A", (config.r, module.in_features))
        b = _part(found, module, "B", (module.out_features, config.r))
        yield Pair(module, a, b)


def _vera_pairs(
    config: _Config, tensors: Mapping[str, Float32], modules: Mapping[str, ModuleShape], max_bytes: int | None
) -> Iterator[Pair]:
    shared = {name: tensors.get(f"base_model.vera_{name}") for name in ("A", "B")}
    all_a, all_b = shared["A"], shared["B"]
    if all_a is None or all_b is None:
        raise FormatError(
            "The VeRA adapter has not its projection matrices. Train or save it with save_projection=True, PEFT's "
            "default: another version of torch may draw others."
        )
    if all_a.ndim != 2 or all_b.ndim != 2 or all_a.shape[0] != config.r or all_b.shape[1] != config.r:
        raise ShapeError(
            f"vera_A has {all_a.shape} and vera_B {all_b.shape}; expected ({config.r}, in), (out, {config.r})."
        )
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("base_model.vera_")}
    found = _by_module(own, _VERA)
    for module in _adapted(found, modules, r=config.r, max_bytes=max_bytes):
        if module.in_features > all_a.shape[1] or module.out_features > all_b.shape[0]:
            raise ShapeError(f"Module {module.name} is larger than the adapter's projection matrices.")
        d, b = _part(found, module, "d", (config.r,)), _part(found, module, "b", (module.out_features,))
        a = np.ascontiguousarray(d[:, None] * all_a[:, : module.in_features])
        yield Pair(module, a, np.ascontiguousarray(b[:, None] * all_b[: module.out_features]))


def _by_module(tensors: Mapping[str, Float32], pattern: re.Pattern[str]) -> dict[str, dict[str, Float32]]:
    found: dict[str, dict[str, Float32]] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            raise FormatError(f"Found the tensor {name!r}; expected names such as {_example(pattern)}.")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise FormatError("The adapter has no weights.")
    return found


def _example(pattern: re.Pattern[str]) -> str:
    end = "lora_A.weight" if pattern is _LORA else "vera_lambda_d"
    return f"base_model.model.<module>.{end}"


def _adapted(
    found: Mapping[str, object], modules: Mapping[str, ModuleShape], *, r: int, max_bytes: int | None
) -> list[ModuleShape]:
    """The adapter's modules in the base model's order."""
    unknown = found.keys() - modules.keys()
    if unknown:
        raise ShapeError(f"The base model has no linear layer {min(unknown)!r}, which the adapter has weights for.")
    adapted = [module for name, module in modules.items() if name in found]
    size = 4 * r * sum(module.in_features + module.out_features for module in adapted)
    if max_bytes is not None and size > max_bytes:
        raise ShapeError(f"As LoRA of rank {r} the adapter has {size:,} bytes; at most {max_bytes:,} can be imported.")
    return adapted


def _part(
    found: Mapping[str, Mapping[str, Float32]], module: ModuleShape, name: str, shape: tuple[int, ...]
) -> Float32:
    tensor = found[module.name].get(name)
    if tensor is None or tensor.shape != shape:
        has = "none" if tensor is None else str(tensor.shape)
        raise ShapeError(f"Module {module.name}, {name}: expected the shape {shape}, found {has}.")
    return tensor


def _alpha(config: _Config) -> float:
    """``lora_alpha`` of the plain scale ``alpha / r``."""
    if config.peft_type == "VERA":
        return float(config.r)
    return config.lora_alpha * math.sqrt(config.r) if config.use_rslora else config.lora_alpha


def _targets(pairs: Sequence[Pair]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(pair.module.name.rpartition(".")[2] for pair in pairs))
