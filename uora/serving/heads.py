"""Heads of classifiers: in a mixed batch, each row goes through the head that was trained with its adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uora.artifact import Artifact
from uora.errors import AdapterNotFoundError, ShapeError
from uora.models import head_modules


class BankedHead(nn.Module):
    """A module of the head that runs each adapter's own copy on its rows."""

    def __init__(self, name: str, heads: Heads) -> None:
        super().__init__()
        self._name = name
        # A list hides the heads from nn.Module: no adapter goes inside of one, and none is a part of the base model.
        self._heads = [heads]

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, ..., in)`` to ``(rows, ..., widest)``: outputs that a row's head does not have are -inf."""
        heads = self._heads[0]
        rows_of: dict[str, list[int]] = {}
        for row, digest in enumerate(heads.digests):
            rows_of.setdefault(digest, []).append(row)
        if len(heads.digests) != len(x):
            raise AdapterNotFoundError(
                f"The head was given {len(x)} rows and {len(heads.digests)} adapters; run it within Heads.serving."
            )
        outputs = {digest: heads.module(digest, self._name)(x[rows]) for digest, rows in rows_of.items()}
        width = max(output.shape[-1] for output in outputs.values())
        order = torch.tensor([row for rows in rows_of.values() for row in rows], device=x.device)
        padded = [F.pad(output, (0, width - output.shape[-1]), value=-torch.inf) for output in outputs.values()]
        return torch.cat(padded)[order.argsort()]


class Heads:
    """The heads of all resident adapters of one base model. Not thread-safe, as the bank that it belongs to."""

    def __init__(self, model: nn.Module) -> None:
        """Put a `BankedHead` in the place of every module of the head of ``model``, as `load_model` has made it.

        To be made before the bank, which adapts the linear layers that are left.
        """
        #: Digests of the running batch's rows; empty between batches.
        self.digests: tuple[str, ...] = ()
        self._templates: dict[str, nn.Module] = {}
        self._modules: dict[str, dict[str, nn.Module]] = {}  # digest -> name -> module
        for name in head_modules(model):
            parent, _, attribute = name.rpartition(".")
            self._templates[name] = model.get_submodule(name).requires_grad_(False)
            setattr(model.get_submodule(parent), attribute, BankedHead(name, self))

    def put(self, artifact: Artifact) -> None:
        """Make an adapter's head resident. One without a head may be served, but not asked for classes.

        Raises:
            ShapeError: the head is not of this model's kind.
        """
        if artifact.manifest.head:
            self._check(artifact)
            head = artifact.head()
            self._modules[artifact.manifest.digest] = {
                name: _with_weights(template, {key: head[f"{name}.{key}"] for key in template.state_dict()})
                for name, template in self._templates.items()
            }

    def _check(self, artifact: Artifact) -> None:
        """Only outputs may differ in number, since adapters have different classes."""
        found = {name: shape[1:] for name, shape in artifact.manifest.head.items()}
        expected = {
            f"{name}.{key}": tuple(tensor.shape[1:])
            for name, template in self._templates.items()
            for key, tensor in template.state_dict().items()
        }
        if found != expected:
            raise ShapeError(
                f"The adapter's head has the parameters {found} (sizes without the first), expected {expected}. It "
                "was trained on another kind of model; serve it on its own."
            )

    def remove(self, digest: str) -> None:
        """Free an adapter's head."""
        self._modules.pop(digest, None)

    def module(self, digest: str, name: str) -> nn.Module:
        """An adapter's own copy of a module of the head."""
        return self._modules[digest][name]

    @contextmanager
    def serving(self, digests: Sequence[str]) -> Iterator[None]:
        """Within the context, row i of a forward's batch goes through the head of ``digests[i]``.

        Raises:
            AdapterNotFoundError: an adapter is not resident, or has no head.
        """
        for digest in digests:
            if digest not in self._modules:
                raise AdapterNotFoundError(
                    f"Adapter {digest[:16]}... has no head here, so it cannot answer with a class or a number. Put an "
                    "adapter into the bank that was trained for that."
                )
        self.digests = tuple(digests)
        try:
            yield
        finally:  # whatever happens, no later batch may see these rows
            self.digests = ()


def _with_weights(template: nn.Module, weights: dict[str, np.ndarray]) -> nn.Module:
    module = copy.deepcopy(template)
    for key, weight in weights.items():
        like = getattr(template, key)
        tensor = torch.from_numpy(np.array(weight)).to(like.device, like.dtype)
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    return module
