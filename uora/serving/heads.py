"""Heads of classifiers: in a mixed batch, each row goes through the head that was trained with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from uora.artifact import Artifact
from uora.errors import AdapterNotFoundError, ShapeError
from uora.models import head_modules
from uora.serving.rows import Row


class BankedHead(nn.Module):
    """A module of the head that runs with each adapter's own parameters on its rows."""

    def __init__(self, name: str, heads: Heads) -> None:
        super().__init__()
        self._name = name
        # A list hides the heads from nn.Module: no adapter goes inside of one, and none is a part of the base model.
        self._heads = [heads]

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, ..., in)`` to ``(rows, ..., widest)``: outputs that a row's head does not have are -inf."""
        heads = self._heads[0]
        if len(heads.rows) != len(x):
            raise AdapterNotFoundError(
                f"The head was given {len(x)} rows and {len(heads.rows)} adapters; run it within Heads.serving."
            )
        places: dict[Row, list[int]] = {}
        for place, row in enumerate(heads.rows):
            places.setdefault(row, []).append(place)
        outputs = [heads.run(self._name, row, x[own]) for row, own in places.items()]
        width = max(output.shape[-1] for output in outputs)
        order = torch.tensor([place for own in places.values() for place in own], device=x.device)
        padded = [F.pad(output, (0, width - output.shape[-1]), value=-torch.inf) for output in outputs]
        return torch.cat(padded)[order.argsort()]


class Heads:
    """The head of one base model, whose parameters every adapter brings along. One thread runs the model."""

    def __init__(self, model: nn.Module) -> None:
        """Put a `BankedHead` in the place of every module of the head of ``model``, as `load_model` has made it.

        To be made before the bank, which adapts the linear layers that are left.
        """
        #: The running batch's; none between batches.
        self.rows: tuple[Row, ...] = ()
        self._templates: dict[str, nn.Module] = {}
        self._like: dict[str, Tensor] = {}  # the parameters that an adapter replaces, by their names in the model
        for name in head_modules(model):
            parent, _, attribute = name.rpartition(".")
            template = self._templates[name] = model.get_submodule(name).requires_grad_(False)
            self._like |= {f"{name}.{key}": tensor for key, tensor in template.state_dict().items()}
            setattr(model.get_submodule(parent), attribute, BankedHead(name, self))

    def parameters(self, artifact: Artifact) -> dict[str, Tensor]:
        """An adapter's own head. One without a head may be served, but not asked for classes.

        Raises:
            ShapeError: the head is not of this model's kind.
        """
        if not artifact.manifest.head:
            return {}
        self._check(artifact)
        head = artifact.head()
        return {
            name: torch.tensor(head[name], device=like.device, dtype=like.dtype) for name, like in self._like.items()
        }

    def _check(self, artifact: Artifact) -> None:
        """Only outputs may differ in number, since adapters have different classes."""
        found = {name: shape[1:] for name, shape in artifact.manifest.head.items()}
        expected = {name: tuple(like.shape[1:]) for name, like in self._like.items()}
        if found != expected:
            raise ShapeError(
                f"The adapter's head has the parameters {found} (sizes without the first), expected {expected}. It "
                "was trained on another kind of model; serve it on its own."
            )

    def run(self, name: str, row: Row, x: Tensor) -> Tensor:
        """A module of the head, with an adapter's own parameters."""
        prefix = f"{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in row.head.items() if key.startswith(prefix)}
        output: Tensor = functional_call(self._templates[name], own, (x,))
        return output

    @contextmanager
    def serving(self, rows: Sequence[Row]) -> Iterator[None]:
        """Within the context, row i of a forward's batch goes through the head of ``rows[i]``.

        Raises:
            AdapterNotFoundError: an adapter has no head.
        """
        for row in rows:
            if not row.head:
                raise AdapterNotFoundError(
                    f"Adapter {row.digest[:16]}... has no head here, so it cannot answer with a class or a number. "
                    "Use an adapter that was trained for that."
                )
        self.rows = tuple(rows)
        try:
            yield
        finally:  # whatever happens, no later batch may see these rows
            self.rows = ()
