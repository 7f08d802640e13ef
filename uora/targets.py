"""Which modules an adapter's targets mean in one base model, for every method alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from uora.errors import TargetError, UnsupportedLayerError
from uora.layout import ModuleShape
from uora.spec import Targets
from uora.tuner._peft import QUERY_VALUE_NAMES

#: Names of query and value projections in model families that are not in PEFT's table, such as vision models.
_USUAL_QUERY_VALUE = (["q_proj", "v_proj"], ["query", "value"])


def base_layer(module: nn.Module) -> nn.Module:
    """The base model's own layer inside the wrappers that adapters put around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of a layer that can be adapted (nn.Linear, quantised or not, and Conv1D), else None."""
    match base_layer(module):
        case nn.Linear(in_features=size_in, out_features=size_out):
            return size_in, size_out
        case Conv1D() as conv:
            return conv.nx, conv.nf
        case _:
            return None


def linears(model: nn.Module) -> dict[str, ModuleShape]:
    """Every layer that can be adapted, by its name in the base model, in the model's order."""
    return dict(_linears(model, ""))


def _linears(module: nn.Module, prefix: str) -> Iterator[tuple[str, ModuleShape]]:
    for name, child in module.named_children():
        sizes = linear_sizes(child)
        if sizes is not None:  # what an adapter has put inside is no layer of the base model
            yield prefix + name, ModuleShape(name=prefix + name, in_features=sizes[0], out_features=sizes[1])
        else:
            yield from _linears(child, f"{prefix}{name}.")


def find(model: nn.Module, targets: Targets, *, head: Sequence[str] = ()) -> dict[str, ModuleShape]:
    """The modules that ``targets`` name.

    Args:
        model: the base model, with or without adapters on it.
        targets: ``all-linear`` (without the output embeddings), ``q,v``, or the last parts of module names.
        head: modules that are trained whole; neither they nor what they contain are adapted.

    Raises:
        TargetError: a target names nothing; the message lists what there is.
        UnsupportedLayerError: a target, or every layer of the model, is of a kind that is not adapted.
    """
    found = {name: shape for name, shape in linears(model).items() if not _is_named(name, head, inside=True)}
    if not found:
        kinds = Counter(type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
        raise UnsupportedLayerError(
            f"The base model has no nn.Linear or Conv1D layer to adapt; its layers are {dict(kinds.most_common(8))}. "
            "Choose another base model."
        )
    match targets:
        case "all-linear":
            output = _output_embeddings(model)
            return {name: shape for name, shape in found.items() if base_layer(model.get_submodule(name)) is not output}
        case "q,v":
            return _named(model, found, _query_value(model, found))
        case names:
            return _named(model, found, names)


def _is_named(name: str, ends: Sequence[str], *, inside: bool = False) -> bool:
    """Whether a module's name is, or ends with, one of ``ends``; or lies inside of one."""
    dotted = f".{name}."
    return any(f".{end}." in dotted if inside else dotted.endswith(f".{end}.") for end in ends)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    output: Any = cast(Any, model).get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return base_layer(output) if isinstance(output, nn.Module) else None


def _query_value(model: nn.Module, found: dict[str, ModuleShape]) -> Sequence[str]:
    family = str(getattr(getattr(model, "config", None), "model_type", None))
    for names in (QUERY_VALUE_NAMES.get(family, ()), *_USUAL_QUERY_VALUE):
        if names and all(any(_is_named(name, [end]) for name in found) for end in names):
            return names
    raise TargetError(
        f"The targets 'q,v' are not known for models of the type {family!r}. Name modules instead; "
        f"{_what_there_is(found)}."
    )


def _named(model: nn.Module, found: dict[str, ModuleShape], ends: Sequence[str]) -> dict[str, ModuleShape]:
    for end in ends:
        if not any(_is_named(name, [end]) for name in found):
            _refuse(model, found, end)
    return {name: shape for name, shape in found.items() if _is_named(name, ends)}


def _refuse(model: nn.Module, found: dict[str, ModuleShape], end: str) -> None:
    for name, module in model.named_modules():
        if _is_named(name, [end]):
            raise UnsupportedLayerError(
                f"The target {end!r} is the module {name}, a {type(module).__name__}; expected an nn.Linear or Conv1D "
                f"layer outside of the head. Choose other targets; {_what_there_is(found)}."
            )
    raise TargetError(f"The target {end!r} names no module of the base model; {_what_there_is(found)}.")


def _what_there_is(found: dict[str, ModuleShape]) -> str:
    return "there are " + ", ".join(sorted({name.rpartition(".")[2] for name in found}))
