"""The state of a run between two optimizer steps: all that another process needs to go on as if nothing had happened.

One safetensors file, never pickled: numbers as tensors, the rest as JSON in its header. Of the model it has what is
trained, and UORA's numbers of hits and counts; everything else is rebuilt from the run's spec.

| tensors | what |
|---|---|
| ``model.<name>`` | trained parameters and counters, by their names in the model |
| ``optimizer.<index>.<key>`` | AdamW's moments and step counts, by the parameters' positions in its groups |
| ``rng.torch``, ``rng.cuda`` | states of torch's generators |
| ``best`` | the adapter of the lowest validation loss so far as a file's bytes, where the result will be that one |
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from uora.errors import StateError
from uora.spec import TrainingSpec
from uora.training.observer import Evaluation

STATE_VERSION = 1
_HEADER_KEY = "state"
#: Parts of names of what is not trained and yet changes in a run: buffers of UORA, and those of a head.
_CHANGING_BUFFERS = (".uora_hits.", ".uora_counts.", ".modules_to_save.")

Json = dict[str, Any]


class Resumable(Protocol):
    """Something that remembers, between steps."""

    def state(self) -> Json:
        """What it remembers, as JSON."""

    def restore(self, state: Json) -> None:
        """Remember that instead."""


def run_identity(
    spec: TrainingSpec, *, base_digest: str, training_sha256: str, validation_sha256: str | None
) -> dict[str, Any]:
    """What a run is: a state only fits a run with the same."""
    return {
        "version": STATE_VERSION,
        "base_digest": base_digest,
        "training_sha256": training_sha256,
        "validation_sha256": validation_sha256,
        "spec": spec.model_dump(mode="json"),
    }


@dataclass(frozen=True)
class RngState:
    """Where all generators are: Python's, NumPy's and torch's global ones."""

    python: tuple[Any, ...]
    numpy: Json
    torch: Tensor
    #: Of the current device; None without one.
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> Self:
        """As they are now."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        )

    def restore(self) -> None:
        """Put them back there."""
        version, numbers, gauss = self.python
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class RunState:
    """A run after an optimizer step, before the evaluation that may follow it.

    Its tensors are the run's own, not copies: it says what was until the optimizer steps again.

    Attributes:
        run: as `run_identity` has it.
        trainer: fields of transformers' ``TrainerState``.
        model: as `changing_tensors` has it.
        optimizer: its ``state_dict``.
        scheduler: its ``state_dict``.
        rng: of all generators.
        parts: of every `Resumable`, by its name.
        best: the evaluation whose adapter the result will be, if the run ended now; None where that is the last one.
    """

    run: Json
    trainer: Json
    model: Mapping[str, Tensor]
    optimizer: Json
    scheduler: Json
    rng: RngState
    parts: Mapping[str, Json]
    best: Evaluation | None

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return int(self.trainer["global_step"])


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a model that changes in a run, by its name; the model's own tensors."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {
        name: buffer for name, buffer in model.named_buffers() if any(part in name for part in _CHANGING_BUFFERS)
    }
    return trained | buffers


@torch.no_grad()
def restore_model(model: nn.Module, state: RunState) -> None:
    """Write a state's numbers into a model.

    Raises:
        StateError: the model has other tensors than the state.
    """
    tensors = changing_tensors(model)
    found = {name: tuple(tensor.shape) for name, tensor in state.model.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise StateError(
            f"Found {name!r} with shape {found.get(name)} in the state, expected {expected.get(name)} as in the model. "
            "The state is of another release or another run; train from the start."
        )
    for name, tensor in tensors.items():
        tensor.copy_(state.model[name])


class _Best(BaseModel):
    step: int
    metrics: dict[str, float]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    run: Json
    trainer: Json
    parameter_groups: list[Json]
    scheduler: Json
    python: tuple[int, list[int], float | None]
    numpy: Json
    parts: dict[str, Json]
    best: _Best | None


def dumps(state: RunState) -> bytes:
    """Serialise."""
    moments = {
        f"optimizer.{index}.{key}": tensor
        for index, values in state.optimizer["state"].items()
        for key, tensor in values.items()
    }
    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()} | moments
    tensors |= {"rng.torch": state.rng.torch} | ({} if state.rng.cuda is None else {"rng.cuda": state.rng.cuda})
    arrays: dict[str, NDArray[Any]] = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    best = None
    if state.best is not None:
        best = _Best(step=state.best.step, metrics=state.best.metrics)
        arrays["best"] = np.frombuffer(state.best.artifact, dtype=np.uint8)
    version, numbers, gauss = state.rng.python
    header = _Header(
        run=state.run,
        trainer=state.trainer,
        parameter_groups=state.optimizer["param_groups"],
        scheduler=state.scheduler,
        python=(version, list(numbers), gauss),
        numpy=_plain(state.rng.numpy),
        parts=dict(state.parts),
        best=best,
    )
    # Contiguous, since safetensors writes a view's memory as it lies.
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    return save(arrays, metadata={_HEADER_KEY: json.dumps(header.model_dump())})


def _plain(rng: Json) -> Json:
    """NumPy's state as JSON."""
    return {**rng, "state": {"key": rng["state"]["key"].tolist(), "pos": int(rng["state"]["pos"])}}


def _as_numpy(plain: Json) -> Json:
    return {**plain, "state": {**plain["state"], "key": np.array(plain["state"]["key"], dtype=np.uint32)}}


def loads(data: bytes, *, run: Json) -> RunState:
    """Read a state and make sure that it is of this run.

    Args:
        data: as `dumps` made it.
        run: what this run is, as `run_identity` has it.

    Raises:
        StateError: no state, or one of another run or release.
    """
    header, arrays = _open(data)
    _check_run(header.run, run)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if name != "best"}
    best = None
    if header.best is not None:
        best = Evaluation(header.best.step, header.best.metrics, arrays["best"].tobytes())
    return RunState(
        run=header.run,
        trainer=header.trainer,
        model=_under("model.", tensors),
        optimizer={"state": _moments(_under("optimizer.", tensors)), "param_groups": header.parameter_groups},
        scheduler=header.scheduler,
        rng=RngState(header.python, _as_numpy(header.numpy), tensors["rng.torch"], tensors.get("rng.cuda")),
        parts=header.parts,
        best=best,
    )


def _open(data: bytes) -> tuple[_Header, dict[str, NDArray[Any]]]:
    """Header and tensors. safetensors' own reader checks the file before we look into it."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        return _Header.model_validate_json(metadata[_HEADER_KEY]), tensors
    except (SafetensorError, ValueError, KeyError, ValidationError) as error:
        raise StateError(
            f"Expected the state of a training run, found something else ({error}). Train from the start."
        ) from error


def _check_run(found: Json, expected: Json) -> None:
    difference = _first_difference(found, expected)
    if difference:
        name, was, wanted = difference
        raise StateError(
            f"The state is of another run: found {name} {was!r}, expected {wanted!r}. Resume with the arguments it was "
            "made with, or train from the start."
        )


def _first_difference(found: Json, expected: Json, prefix: str = "") -> tuple[str, Any, Any] | None:
    """Name of the first value that differs, with both; None if none does."""
    for key in [*expected, *(key for key in found if key not in expected)]:
        was, wanted = found.get(key), expected.get(key)
        if was == wanted:
            continue
        if isinstance(was, dict) and isinstance(wanted, dict):
            return _first_difference(was, wanted, f"{prefix}{key}.")
        return prefix + key, was, wanted
    return None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _moments(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """``<index>.<key>`` to an optimizer's state."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    return moments
