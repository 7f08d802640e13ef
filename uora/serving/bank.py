"""Adapters of one base model, of any methods, as rows of stacked tensors.

Each family of adapters (``uora.serving.families``) has its stacks: for every adapted layer the numbers of its adapters,
one row each. A batch gathers one row per request, so its cost does not depend on how many adapters it mixes. Row 0 of
every stack is zero and stands for "this layer is not adapted".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from uora import targets
from uora.artifact import Artifact, Manifest
from uora.errors import AdapterNotFoundError, ArtifactError
from uora.frames import check_fingerprint
from uora.methods import adapter_fingerprint, check_modules
from uora.quantised import keep_weight_layout
from uora.serving.families import ServingFamily, family_of
from uora.svd import BaseWeights

#: Rows that a stack grows by at least.
_CHUNK = 16


class HeadStore(Protocol):
    """Where the heads of classifiers are kept (``uora.serving.heads``)."""

    def put(self, artifact: Artifact) -> None:
        """Make an adapter's head resident."""

    def remove(self, digest: str) -> None:
        """Free it."""


class _Stack:
    """Rows of equal shape that grow in chunks; row 0 is zero."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.rows = torch.zeros(_CHUNK, *shape, device=device)

    def put(self, row: int, values: Tensor) -> None:
        """Write one row, growing as needed. Stacks double, so that a row is copied a constant number of times."""
        if row >= len(self.rows):
            grown = max(row + 1, 2 * len(self.rows))
            self.rows = torch.cat([self.rows, self.rows.new_zeros(grown - len(self.rows), *self.rows.shape[1:])])
        self.rows[row] = values

    def gather(self, rows: Tensor) -> Tensor:
        """``(len(rows), ...)``; rows never written are zero."""
        return self.rows[rows * (rows < len(self.rows))]

    def clear(self, row: int) -> None:
        """Zero a row."""
        if row < len(self.rows):
            self.rows[row].zero_()


@dataclass
class _FamilyRows:
    """Everything resident of one family."""

    family: ServingFamily
    #: Module -> name of its numbers -> rows.
    stacks: dict[str, dict[str, _Stack]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # digest -> row
    free: list[int] = field(default_factory=list)
    #: Which numbers each row has; some adapters do without some.
    names: dict[int, frozenset[str]] = field(default_factory=dict)

    def put(self, artifact: Artifact, device: torch.device) -> None:
        """Write an adapter into a row that no other uses; row 0 is never given away."""
        row = self.free.pop() if self.free else len(self.rows) + 1
        names: set[str] = set()
        for module, numbers in self.family.rows(artifact):
            stacks = self.stacks.setdefault(module, {})
            for name, values in numbers.items():
                stacks.setdefault(name, _Stack(values.shape, device)).put(row, values)
            names |= numbers.keys()
        self.rows[artifact.manifest.digest] = row
        self.names[row] = frozenset(names)

    def remove(self, digest: str) -> None:
        """Free a row, zeroed in every layer: the next adapter there may leave some of these layers alone."""
        row = self.rows.pop(digest)
        del self.names[row]
        for stacks in self.stacks.values():
            for stack in stacks.values():
                stack.clear(row)
        self.free.append(row)


@dataclass(frozen=True)
class _Group:
    """The rows of one batch that belong to one family."""

    members: _FamilyRows
    batch_rows: Tensor | None  # (k,) positions in the batch; None when it is the whole batch
    bank_rows: Tensor  # (k,)
    names: frozenset[str]  # numbers that any of them has

    def update(self, module: str, x: Tensor) -> Tensor:
        """Updates of these rows, ``(k, ..., out)``, from the whole batch's activations."""
        stacks = self.members.stacks[module]
        numbers = {name: stacks[name].gather(self.bank_rows) for name in self.names & stacks.keys()}
        return self.members.family.update(module, x if self.batch_rows is None else x[self.batch_rows], numbers)


class BankedLinear(nn.Module):
    """A linear layer of the base model that adds to each row of a batch its own adapter's update."""

    def __init__(self, base_layer: nn.Module, name: str, bank: AdapterBank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._name = name
        # A list hides the bank from nn.Module, which would count it as a part of every layer.
        self._bank = [bank]

    @property
    def weight(self) -> Tensor:
        """The base layer's; some models read it directly."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, ..., in)`` to ``(rows, ..., out)``."""
        # A slice such as the last position would make torch copy the weight once per row (0.9 GB for a head of
        # 49,152 tokens and 16 rows) where copying the activations costs nothing.
        x = x.contiguous()
        result: Tensor = self.base_layer(x)
        for group in self._bank[0].groups:
            if self._name in group.members.stacks:
                update = group.update(self._name, x)
                rows = group.batch_rows
                result = result + update if rows is None else result.index_add(0, rows, update)
        return result


class AdapterBank:
    """All adapters of one base model. Not thread-safe: one thread puts, removes and runs the model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        base_digest: str,
        cache_dir: Path | None = None,
        weights: BaseWeights | None = None,
        heads: HeadStore | None = None,
    ) -> None:
        """Put a `BankedLinear` in the place of every linear layer of ``model``.

        Args:
            model: the shared base model; its weights are never changed.
            base_digest: its weights' digest; adapters of another base are refused.
            cache_dir: disk cache of frames and singular vectors, where ``weights`` brings none.
            weights: the base model's own weights; None takes them from ``model``, as it is.
            heads: where heads of classifiers go; None where there are none.
        """
        self.base_digest = base_digest
        self.groups: tuple[_Group, ...] = ()
        #: Manifests of the resident adapters by digest.
        self.manifests: dict[str, Manifest] = {}
        self._model = model
        self._base = weights or BaseWeights.of_model(model, digest=base_digest, cache_dir=cache_dir)
        self._heads = heads
        self._families: dict[ServingFamily, _FamilyRows] = {}
        self._device = next(model.parameters()).device
        keep_weight_layout(model)
        for name in targets.linears(model):
            parent_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent_name), attribute, BankedLinear(model.get_submodule(name), name, self))

    def __contains__(self, digest: str) -> bool:
        return digest in self.manifests

    def __len__(self) -> int:
        return len(self.manifests)

    def check(self, manifest: Manifest) -> None:
        """Make sure that an adapter belongs to this base model, and that what it shares is the same here.

        Raises:
            ArtifactError: it was trained on another base model.
            ShapeError: a module is missing here or has other sizes.
            FingerprintError: the frames or singular vectors built here differ from those it was trained on.
        """
        if manifest.base_digest != self.base_digest:
            raise ArtifactError(
                f"The adapter was trained on another base model: expected digest {manifest.base_digest[:16]}..., "
                f"this one has {self.base_digest[:16]}.... Serve it on its own base model.",
                code="base_model_mismatch",
            )
        check_modules(self._model, manifest)
        found = adapter_fingerprint(manifest.adapter, manifest.modules, self._base)
        check_fingerprint(manifest.fingerprint, found)

    def put(self, artifact: Artifact) -> None:
        """Make a checked adapter resident; one that is resident already stays as it is.

        Raises:
            ShapeError: its head is of another kind of model.
        """
        manifest = artifact.manifest
        if manifest.digest in self:
            return
        if self._heads is not None:
            self._heads.put(artifact)  # before the rows: it refuses heads of another model
        family = family_of(manifest.adapter, self._base)
        self._families.setdefault(family, _FamilyRows(family)).put(artifact, self._device)
        self.manifests[manifest.digest] = manifest

    def remove(self, digest: str) -> None:
        """Free an adapter's row. No running request may use it."""
        self._families[family_of(self.manifests.pop(digest).adapter, self._base)].remove(digest)
        if self._heads is not None:
            self._heads.remove(digest)

    @contextmanager
    def serving(self, digests: Sequence[str | None]) -> Iterator[None]:
        """Within the context, row i of a forward's batch belongs to the adapter ``digests[i]``; None is the base.

        Raises:
            AdapterNotFoundError: a digest is not resident.
        """
        self.groups = self._group(digests)
        try:
            yield
        finally:  # whatever happens, no later batch may see these rows
            self.groups = ()

    def _group(self, digests: Sequence[str | None]) -> tuple[_Group, ...]:
        members: dict[ServingFamily, list[tuple[int, int]]] = {}
        for batch_row, digest in enumerate(digests):
            if digest is None:
                continue
            manifest = self.manifests.get(digest)
            if manifest is None:
                raise AdapterNotFoundError(f"Adapter {digest[:16]}... is not resident; put it into the bank first.")
            family = family_of(manifest.adapter, self._base)
            members.setdefault(family, []).append((batch_row, self._families[family].rows[digest]))
        return tuple(self._group_of(family, rows, len(digests)) for family, rows in members.items())

    def _group_of(self, family: ServingFamily, rows: list[tuple[int, int]], batch: int) -> _Group:
        members = self._families[family]
        batch_rows, bank_rows = zip(*rows, strict=True)
        return _Group(
            members,
            batch_rows=None if len(rows) == batch else torch.tensor(batch_rows, device=self._device),
            bank_rows=torch.tensor(bank_rows, device=self._device),
            names=frozenset().union(*(members.names[row] for row in bank_rows)),
        )
