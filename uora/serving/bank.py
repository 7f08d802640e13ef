"""Adapters of one base model as rows of stacked tensors.

Each family of frames has its stacks: for every adapted layer d ``(rows, r)`` and b ``(rows, out)``, and the blend
weights w ``(rows, r)`` of all layers. A batch gathers one row per request, so its cost does not depend on how many
adapters it mixes. Row 0 of every stack is zero and stands for "this layer is not adapted".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from uora.artifact import Artifact, Manifest
from uora.delta import Family, mixed_delta
from uora.errors import AdapterNotFoundError, ArtifactError, ShapeError
from uora.frames import check_fingerprint, fingerprint

#: Rows that a stack grows by at least.
_CHUNK = 16


class _Stack:
    """Rows of equal length that grow in chunks; row 0 is zero."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(_CHUNK, width, device=device)

    def put(self, row: int, values: Tensor) -> None:
        """Write one row, growing as needed. Stacks double, so that a row is copied a constant number of times."""
        if row >= len(self.rows):
            self.rows = F.pad(self.rows, (0, 0, 0, max(row + 1 - len(self.rows), len(self.rows))))
        self.rows[row] = values

    def gather(self, rows: Tensor) -> Tensor:
        """``(len(rows), width)``; rows never written are zero."""
        return self.rows[rows.clamp(max=len(self.rows) - 1) * (rows < len(self.rows))]


@dataclass
class _FamilyRows:
    """Everything resident of one family."""

    family: Family
    weights: _Stack
    d: dict[str, _Stack] = field(default_factory=dict)
    b: dict[str, _Stack] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # digest -> row
    free: list[int] = field(default_factory=list)
    hit: set[int] = field(default_factory=set)  # rows whose adapter has hits

    def next_row(self) -> int:
        """A row that no adapter uses; row 0 is never given away."""
        return self.free.pop() if self.free else len(self.rows) + 1


@dataclass(frozen=True)
class _Group:
    """The rows of one batch that belong to one family."""

    stacks: _FamilyRows
    batch_rows: Tensor | None  # (k,) positions in the batch; None when it is the whole batch
    bank_rows: Tensor  # (k,)
    weight: Tensor | None  # (k, r); None when none of them has hits


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
            if self._name in group.stacks.d:
                result = self._add(result, x, group)
        return result

    def _add(self, result: Tensor, x: Tensor, group: _Group) -> Tensor:
        rows = group.batch_rows
        update = mixed_delta(
            x if rows is None else x[rows],
            group.stacks.family,
            d=group.stacks.d[self._name].gather(group.bank_rows),
            b=group.stacks.b[self._name].gather(group.bank_rows),
            weight=group.weight,
        )
        return result + update if rows is None else result.index_add(0, rows, update)


class AdapterBank:
    """All adapters of one base model. Not thread-safe: one thread puts, removes and runs the model."""

    def __init__(self, model: nn.Module, *, base_digest: str, cache_dir: Path | None = None) -> None:
        """Put a `BankedLinear` in the place of every linear layer of ``model``.

        Args:
            model: the shared base model; its weights are never changed.
            base_digest: its weights' digest; adapters of another base are refused.
            cache_dir: disk cache of frames.
        """
        self.base_digest = base_digest
        self.groups: tuple[_Group, ...] = ()
        self._cache_dir = cache_dir
        self._families: dict[Family, _FamilyRows] = {}
        #: Manifests of the resident adapters by digest.
        self.manifests: dict[str, Manifest] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._device = next(model.parameters()).device
        self._wrap_linears(model)

    def __contains__(self, digest: str) -> bool:
        return digest in self.manifests

    def __len__(self) -> int:
        return len(self.manifests)

    def _wrap_linears(self, model: nn.Module) -> None:
        linears = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        for name, layer in linears:
            parent_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent_name), attribute, BankedLinear(layer, name, self))
            shape = layer.weight.shape
            self._sizes[name] = (shape[0], shape[1]) if isinstance(layer, Conv1D) else (shape[1], shape[0])

    def check(self, manifest: Manifest) -> None:
        """Make sure that an adapter belongs to this base model and these frames.

        Raises:
            ArtifactError: it was trained on another base model.
            ShapeError: a module is missing here or has other sizes.
            FingerprintError: the frames built here differ from those it was trained on.
        """
        if manifest.base_digest != self.base_digest:
            raise ArtifactError(
                f"The adapter was trained on another base model: expected digest {manifest.base_digest[:16]}..., "
                f"this one has {self.base_digest[:16]}.... Serve it on its own base model.",
                code="base_model_mismatch",
            )
        for module in manifest.modules:
            found, expected = self._sizes.get(module.name), (module.in_features, module.out_features)
            if found != expected:
                raise ShapeError(
                    f"Module {module.name}: the adapter was trained on (in, out) = {expected}, the base has {found}."
                )
        check_fingerprint(manifest.fingerprint, fingerprint(manifest.frame_keys(), self._cache_dir))

    def put(self, artifact: Artifact) -> None:
        """Make a checked adapter resident; one that is resident already stays as it is."""
        manifest = artifact.manifest
        if manifest.digest in self:
            return
        family = self._family(manifest)
        stacks = self._families.get(family)
        if stacks is None:
            stacks = self._families[family] = _FamilyRows(family, _Stack(family.r, self._device))
        row = stacks.next_row()
        self._write(stacks, row, artifact)
        stacks.rows[manifest.digest] = row
        self.manifests[manifest.digest] = manifest

    def _family(self, manifest: Manifest) -> Family:
        return Family(manifest.adapter.frame_seed, manifest.adapter.r, self._cache_dir)

    def _write(self, stacks: _FamilyRows, row: int, artifact: Artifact) -> None:
        self._clear(stacks, row)
        stacks.weights.put(row, torch.from_numpy(artifact.weight()))
        if artifact.tensors["hits"].any():
            stacks.hit.add(row)
        for module, d, b in artifact.vectors():
            if module.name not in stacks.d:
                stacks.d[module.name] = _Stack(len(d), self._device)
                stacks.b[module.name] = _Stack(len(b), self._device)
            stacks.d[module.name].put(row, torch.from_numpy(d.copy()))
            stacks.b[module.name].put(row, torch.from_numpy(b.copy()))

    @staticmethod
    def _clear(stacks: _FamilyRows, row: int) -> None:
        """Zero a row in every layer: its last adapter may have had layers that the next one leaves alone."""
        stacks.hit.discard(row)
        for stack in (stacks.weights, *stacks.d.values(), *stacks.b.values()):
            if row < len(stack.rows):
                stack.rows[row].zero_()

    def remove(self, digest: str) -> None:
        """Free an adapter's row. No running request may use it."""
        stacks = self._families[self._family(self.manifests.pop(digest))]
        row = stacks.rows.pop(digest)
        self._clear(stacks, row)
        stacks.free.append(row)

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
        members: dict[Family, list[tuple[int, int]]] = {}
        for batch_row, digest in enumerate(digests):
            if digest is None:
                continue
            manifest = self.manifests.get(digest)
            if manifest is None:
                raise AdapterNotFoundError(f"Adapter {digest[:16]}... is not resident; put it into the bank first.")
            family = self._family(manifest)
            members.setdefault(family, []).append((batch_row, self._families[family].rows[digest]))
        return tuple(self._group_of(family, rows, len(digests)) for family, rows in members.items())

    def _group_of(self, family: Family, rows: list[tuple[int, int]], batch: int) -> _Group:
        stacks = self._families[family]
        bank_rows = torch.tensor([bank for _, bank in rows], device=self._device)
        any_hit = any(bank in stacks.hit for _, bank in rows)
        return _Group(
            stacks,
            batch_rows=None if len(rows) == batch else torch.tensor([row for row, _ in rows], device=self._device),
            bank_rows=bank_rows,
            weight=stacks.weights.gather(bank_rows) if any_hit else None,
        )
