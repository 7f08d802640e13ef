"""Every method through one interface: put on a base model, trained by PEFT, taken off as a stored adapter.

LoRA and VeRA are PEFT's own tuners, OLoRA is LoRA with another start, UORA and OSoRA are tuners of ours
(``uora.tuner``, ``uora.osora``). What distinguishes the methods here is a `_Method` each; the rest of this module and
everything that trains, stores or serves is the same for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from uora import layout, targets
from uora.artifact import HEAD, Artifact, Manifest, Provenance, dumps
from uora.delta import Family, frame_tensor
from uora.errors import RankError, ShapeError
from uora.frames import check_fingerprint, fingerprint
from uora.layout import ModuleShape, pair_rank
from uora.memory import available_bytes
from uora.osora import OsoraConfig
from uora.spec import AdapterSpec, LoraSpec, OloraSpec, OsoraSpec, Task, UoraSpec, VeraSpec
from uora.svd import BaseWeights
from uora.tuner import UoraConfig, UoraModel
from uora.tuner._peft import BaseTunerLayer, BufferDict

Layers = Mapping[str, BaseTunerLayer]


class _Method(Protocol):
    """What a method has of its own."""

    def config(self, base: BaseWeights) -> PeftConfig:
        """PEFT's configuration, without its targets."""

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        """What PEFT's injection leaves to do."""

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        """A layer's own numbers, by their names in ``uora.layout``."""


class _Uora:
    def __init__(self, spec: UoraSpec) -> None:
        self._spec = spec

    def config(self, base: BaseWeights) -> PeftConfig:
        return UoraConfig.of(self._spec, target_modules=None, frame_cache_dir=base.cache_dir)

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        pass

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"d": layer.uora_lambda_d[adapter_name], "b": layer.uora_lambda_b[adapter_name]}


class _Vera:
    def __init__(self, spec: VeraSpec) -> None:
        self._spec = spec

    def config(self, base: BaseWeights) -> PeftConfig:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")  # ours come from a seed
            return VeraConfig(
                r=self._spec.r,
                vera_dropout=self._spec.dropout,
                d_initial=self._spec.d_initial,
                save_projection=False,
            )

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        """Give every layer the matrices of its own size, in the place of slices of PEFT's largest."""
        family = Family(self._spec.frame_seed, self._spec.r, base.cache_dir, layout.VERA_INIT)
        for layer in layers.values():
            like = torch.empty(0, device=layer.vera_lambda_d[adapter_name].device)
            a = frame_tensor(family, "A", 0, layer.in_features, like=like)
            b_rows = frame_tensor(family, "B", 0, layer.out_features, like=like)
            layer.vera_A = _with(layer.vera_A, adapter_name, a)
            layer.vera_B = _with(layer.vera_B, adapter_name, b_rows.T)

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"d": layer.vera_lambda_d[adapter_name], "b": layer.vera_lambda_b[adapter_name]}


def _with(shared: BufferDict, name: str, matrix: Tensor) -> BufferDict:
    return BufferDict({**dict(shared.items()), name: matrix}, persistent=False)


class _Lora:
    def __init__(self, spec: LoraSpec | OloraSpec) -> None:
        self._spec = spec
        self._rank = pair_rank(spec)

    def config(self, base: BaseWeights) -> PeftConfig:
        return LoraConfig(
            r=self._rank,
            lora_alpha=self._spec.lora_alpha * self._rank / self._spec.r,  # type: ignore[arg-type] # floats work
            lora_dropout=self._spec.dropout,
        )

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        pass

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"lora_a": layer.lora_A[adapter_name].weight, "lora_b": layer.lora_B[adapter_name].weight}


class _Olora(_Lora):
    """LoRA of twice the rank: the trained pair, and the initial one with B negated, which stays as it is.

    So the base model keeps its weights; PEFT's own OLoRA subtracts the initial pair from them, which rounds a bfloat16
    or quantised base anew.
    """

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        # Of this very model, rounded or quantised as it may be: both pairs are stored, so none is ever rebuilt.
        for name, weight in BaseWeights.of_model(model).weights(layers):
            a, b = self.parameters(layers[name], adapter_name).values()
            self._start(a, b, weight.to(a.device))
            self._freeze_initial(a, b)

    @torch.no_grad()
    def _start(self, a: Tensor, b: Tensor, weight: Tensor) -> None:
        """The first r columns of Q and rows of R, where ``W = Q R``; beyond the weight's own rank as LoRA starts."""
        r = self._spec.r
        q, rest = torch.linalg.qr(weight)
        k = min(r, q.shape[1])
        b.zero_()
        a[:k], b[:, :k] = rest[:k], q[:, :k]
        a[r:] = 0.0
        a[r : r + k], b[:, r : r + k] = rest[:k], -q[:, :k]

    def _freeze_initial(self, a: Tensor, b: Tensor) -> None:
        r = self._spec.r
        rows = torch.arange(2 * r, device=a.device) < r
        if a.requires_grad:
            a.register_hook(lambda gradient: gradient * rows[:, None])
            b.register_hook(lambda gradient: gradient * rows)


class _Osora:
    def __init__(self, spec: OsoraSpec) -> None:
        self._spec = spec

    def config(self, base: BaseWeights) -> PeftConfig:
        return OsoraConfig.of(self._spec, base=base)

    def prepare(self, model: PeftModel, layers: Layers, adapter_name: str, base: BaseWeights) -> None:
        pass

    def parameters(self, layer: Any, adapter_name: str) -> dict[str, Tensor]:
        return {"s": layer.osora_s[adapter_name], "o": layer.osora_o[adapter_name]}


def _method(spec: AdapterSpec) -> _Method:
    match spec:
        case UoraSpec():
            return _Uora(spec)
        case VeraSpec():
            return _Vera(spec)
        case LoraSpec():
            return _Lora(spec)
        case OloraSpec():
            return _Olora(spec)
        case OsoraSpec():
            return _Osora(spec)


def attach(
    model: nn.Module | PeftModel,
    spec: AdapterSpec,
    *,
    base: BaseWeights,
    adapter_name: str = "default",
    head: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Put a new, trainable adapter on a base model, or beside the adapters of the same method on a PeftModel.

    Args:
        model: the base model; its weights are never changed.
        spec: the adapter.
        base: the base model's own weights.
        adapter_name: PEFT's name for it.
        head: names of modules to train whole and store with the adapter.
        seed: of random starts (lora, the head's copy has its own).

    Raises:
        TargetError, UnsupportedLayerError: as for `uora.targets.find`.
        RankError: there is not enough memory for the rank.
    """
    modules = targets.find(_base_model(model), spec.targets, head=head)
    return _attach(model, spec, list(modules.values()), base, adapter_name, head, seed)


def _attach(
    model: nn.Module | PeftModel,
    spec: AdapterSpec,
    modules: Sequence[ModuleShape],
    base: BaseWeights,
    adapter_name: str,
    head: Sequence[str],
    seed: int,
) -> PeftModel:
    check_memory(spec, modules, device=next(model.parameters()).device)
    method = _method(spec)
    config = cast(Any, method.config(base))
    config.target_modules = {module.name for module in modules}
    config.modules_to_save = list(head) or None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = _inject(model, config, adapter_name)
    layers = adapted_layers(peft_model, adapter_name)
    if list(layers) != [module.name for module in modules]:
        raise ShapeError(f"PEFT adapted {sorted(layers)}, expected {sorted(module.name for module in modules)}.")
    method.prepare(peft_model, layers, adapter_name, base)
    return peft_model


def _inject(model: nn.Module | PeftModel, config: PeftConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=adapter_name))
    with _own_matrices(model, config, adapter_name) if isinstance(config, VeraConfig) else nullcontext():
        model.add_adapter(adapter_name, config)
    return model


@contextmanager
def _own_matrices(model: PeftModel, config: VeraConfig, adapter_name: str) -> Iterator[None]:
    """Keep the layers' own matrices while PEFT adds another VeRA adapter.

    PEFT would have every adapter use the first one's; the new adapter's come in `_Vera.prepare`.
    """
    tuner = cast(Any, model.base_model)
    layers = [layer for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)]
    own = [(layer, layer.vera_A, layer.vera_B) for layer in layers]
    nothing = torch.zeros(())
    tuner.vera_A[adapter_name] = nothing.expand(config.r, max(layer.in_features for layer in layers))
    tuner.vera_B[adapter_name] = nothing.expand(max(layer.out_features for layer in layers), config.r)
    yield
    for layer, a, b in own:
        layer.vera_A, layer.vera_B = a, b


def adapted_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, BaseTunerLayer]:
    """The layers that an adapter is on, by their names in the base model, in the model's order."""
    return {
        name: layer
        for name, layer in _base_model(model).named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, layer.adapter_layer_names[0])
    }


def _base_model(model: nn.Module) -> nn.Module:
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def adapter_fingerprint(
    spec: AdapterSpec, modules: Sequence[ModuleShape], base: BaseWeights
) -> dict[str, list[float]]:
    """Probes of what an adapter shares with others on this machine: frames, singular vectors, or nothing."""
    if isinstance(spec, OsoraSpec):
        return base.fingerprint([module.name for module in modules], spec.r)
    return fingerprint(layout.frame_keys(spec, modules), base.cache_dir)


def export_artifact(
    model: PeftModel,
    spec: AdapterSpec,
    *,
    base: BaseWeights,
    provenance: Provenance,
    task: Task = "chat",
    labels: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    adapter_name: str = "default",
) -> bytes:
    """An adapter as it is now, in its stored form.

    Raises:
        NonFiniteError: the training diverged.
    """
    method, layers = _method(spec), adapted_layers(model, adapter_name)
    modules = tuple(_shape(name, layer) for name, layer in layers.items())
    parts = [
        {name: _array(tensor) for name, tensor in method.parameters(layer, adapter_name).items()}
        for layer in layers.values()
    ]
    tensors = layout.pack(spec, parts)
    if isinstance(spec, UoraSpec):
        tensors["hits"] = _hits(model, adapter_name).cpu().numpy().astype(np.int32)
    head = {name: _array(tensor) for name, tensor in _head(model, adapter_name).items()}
    manifest = Manifest.of(
        provenance,
        adapter=spec,
        task=task,
        modules=modules,
        fingerprint=adapter_fingerprint(spec, modules, base),
        labels=tuple(labels),
        head={name: tensor.shape for name, tensor in head.items()},
        metrics=dict(metrics or {}),
    )
    return dumps(Artifact(manifest, tensors | {HEAD + name: tensor for name, tensor in head.items()}))


def _shape(name: str, layer: BaseTunerLayer) -> ModuleShape:
    return ModuleShape(name=name, in_features=layer.in_features, out_features=layer.out_features)


def _array(tensor: Tensor) -> layout.Array:
    # A copy: training goes on, and on a CPU the array would share the parameter's memory.
    return np.array(tensor.detach().float().cpu().numpy())


def _hits(model: PeftModel, adapter_name: str) -> Tensor:
    hits: Tensor = cast(UoraModel, model.base_model).uora_hits[adapter_name]
    return hits


def _head(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Parameters and buffers of the modules that were trained whole, by their names in the base model."""
    return {
        f"{name}.{key}": tensor
        for name, module in _base_model(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items()
    }


def load_artifact(
    model: nn.Module | PeftModel, artifact: Artifact, *, base: BaseWeights, adapter_name: str = "default"
) -> PeftModel:
    """Put a stored adapter on a base model, or beside the adapters of a PeftModel, trainable as it was.

    Raises:
        FingerprintError: the frames or singular vectors built here are not those it was trained on.
        ShapeError: the model has no such modules, or of other sizes.
    """
    manifest = artifact.manifest
    check_modules(_base_model(model), manifest)
    found = adapter_fingerprint(manifest.adapter, manifest.modules, base)
    check_fingerprint(manifest.fingerprint, found)
    head = sorted({name.rpartition(".")[0] for name in manifest.head})
    peft_model = _attach(model, manifest.adapter, manifest.modules, base, adapter_name, head, seed=0)
    _restore(peft_model, artifact, adapter_name)
    return peft_model


def check_modules(base_model: nn.Module, manifest: Manifest) -> None:
    """Make sure that a base model has an adapter's modules.

    Raises:
        ShapeError: it has not, or of other sizes.
    """
    existing = targets.linears(base_model)
    for module in manifest.modules:
        found = existing.get(module.name)
        if found != module:
            raise ShapeError(
                f"Module {module.name}: the adapter was trained on (in, out) = "
                f"{(module.in_features, module.out_features)}, the base model has "
                f"{(found.in_features, found.out_features) if found else 'no such linear layer'}."
            )


@torch.no_grad()
def _restore(model: PeftModel, artifact: Artifact, adapter_name: str) -> None:
    method, layers = _method(artifact.manifest.adapter), adapted_layers(model, adapter_name)
    for module, parts in artifact.parts():
        for name, parameter in method.parameters(layers[module.name], adapter_name).items():
            parameter.copy_(torch.from_numpy(np.array(parts[name])))
    if isinstance(artifact.manifest.adapter, UoraSpec):
        _hits(model, adapter_name).copy_(torch.from_numpy(artifact.tensors["hits"].astype(np.int64)))
    stored = artifact.head()
    for name, parameter in _head(model, adapter_name).items():
        parameter.copy_(torch.from_numpy(np.array(stored[name])))


def check_memory(spec: AdapterSpec, modules: Sequence[ModuleShape], *, device: torch.device) -> None:
    """Refuse a rank whose matrices this machine cannot hold.

    Raises:
        RankError: it needs more than is free.
    """
    needed, free = _bytes_needed(spec, modules), available_bytes(device)
    if needed > free:
        raise RankError(
            f"Rank {spec.r} of the method {spec.method} over {len(modules)} modules needs {needed / 2**30:.1f} GiB, found "
            f"{free / 2**30:.1f} GiB free. Take a rank of {max(1, int(spec.r * free / needed))} at most, or fewer targets."
        )


def _bytes_needed(spec: AdapterSpec, modules: Sequence[ModuleShape]) -> int:
    """Bytes of the matrices that grow with the rank: shared ones as float32; own ones with gradient and Adam's moments."""
    if isinstance(spec, LoraSpec | OloraSpec):
        return 4 * 4 * pair_rank(spec) * sum(m.in_features + m.out_features for m in modules)
    if isinstance(spec, OsoraSpec):
        return 4 * spec.r * sum(m.in_features + m.out_features for m in modules)
    keys = layout.frame_keys(spec, modules)
    # While one is built, its normals and factors are there in float64.
    return sum(4 * key.r * key.n for key in keys) + max(3 * 8 * key.r * key.n for key in keys)
