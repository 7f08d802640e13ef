"""Adapters of one base model, of any methods, mixed freely in one batch.

Every adapter is a row of its own (``uora.serving.rows``), in the precision that the model computes in. Those of a batch
are laid side by side when its composition changes, and each family of adapters (``uora.serving.families``) computes the
updates of all its rows with the same products, so that the cost does not depend on how many adapters a batch mixes, or
on how many there are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uora import targets
from uora.artifact import Artifact, Manifest
from uora.errors import AdapterNotFoundError, ArtifactError
from uora.frames import check_fingerprint
from uora.layout import ModuleShape
from uora.methods import adapter_fingerprint, check_modules
from uora.quantised import keep_weight_layout
from uora.serving.composition import Composition, Group, Modules
from uora.serving.families import ServingFamily, family_of
from uora.serving.heads import Heads
from uora.serving.products import product
from uora.serving.rows import Row
from uora.svd import BaseWeights


class BankedLinear(nn.Module):
    """A linear layer of the base model that adds to each row of a batch its own adapter's update."""

    def __init__(self, base_layer: nn.Module, shape: ModuleShape, bank: AdapterBank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = shape.name
        self._here = Modules({shape.name: slice(0, shape.out_features)})
        # A list hides the bank from nn.Module, which would count it as a part of every layer.
        self._bank = [bank]

    @cached_property
    def _product(self) -> Callable[[Tensor], Tensor]:
        """Made when it is used first: a layer that is fused with others never is."""
        layer = self.base_layer
        return product(layer.weight, layer.bias) if type(layer) is nn.Linear else layer

    @property
    def weight(self) -> Tensor:
        """The base layer's; some models read it directly."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        # A slice such as the last position would make torch copy the weight once per row (0.9 GB for a head of
        # 49,152 tokens and 16 rows) where copying the activations costs nothing.
        x = x.contiguous()
        result: Tensor = self._product(x)
        self._bank[0].add(self._here, x, result)
        return result


class _Pool:
    """Rows within a budget of bytes; the one that was used least recently goes first."""

    def __init__(self, budget: int | None) -> None:
        self._budget = budget
        self.rows: OrderedDict[str, Row] = OrderedDict()
        self.bytes = 0

    def has_room(self, row: Row) -> bool:
        """Whether it fits without that another goes."""
        return self._budget is None or self.bytes + row.bytes <= self._budget

    def put(self, row: Row) -> list[str]:
        """Take a row in; returns the digests of those that had to go. The newest stays whatever its size."""
        self.rows[row.digest] = row
        self.bytes += row.bytes
        gone = []
        while self._budget is not None and self.bytes > self._budget and len(self.rows) > 1:
            digest = next(iter(self.rows))
            self.remove(digest)
            gone.append(digest)
        return gone

    def remove(self, digest: str) -> None:
        self.bytes -= self.rows.pop(digest).bytes


class AdapterBank:
    """All adapters of one base model. Threads may put, remove and look up; one thread runs the model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        base_digest: str,
        cache_dir: Path | None = None,
        weights: BaseWeights | None = None,
        heads: Heads | None = None,
        budget: int | None = None,
    ) -> None:
        """Put a `BankedLinear` in the place of every linear layer of ``model``.

        Args:
            model: the shared base model; its weights are never changed.
            base_digest: its weights' digest; adapters of another base are refused.
            cache_dir: disk cache of frames and singular vectors, where ``weights`` brings none.
            weights: the base model's own weights; None takes them from ``model``, as it is.
            heads: of the model, if its adapters are classifiers.
            budget: bytes for adapters, a quarter of it for those with matrices (LoRA), so that these do not drive out
                thousands of others. Beyond it, those used least recently go. None keeps all.
        """
        self.base_digest = base_digest
        self.manifests: dict[str, Manifest] = {}
        #: The base model's layers that adapters can have.
        self.linears = targets.linears(model)
        #: Whose rows the running forward has; nothing between forwards.
        self.composition: Composition | None = None
        self._outputs: Composition | None = None
        self._base = weights or BaseWeights.of_model(model, digest=base_digest, cache_dir=cache_dir)
        self._heads = heads
        matrices = None if budget is None else budget // 4
        vectors = None if budget is None or matrices is None else budget - matrices
        self._pools = {False: _Pool(vectors), True: _Pool(matrices)}
        self._module_lists: dict[tuple[ModuleShape, ...], tuple[ModuleShape, ...]] = {}
        self._lock = threading.RLock()
        parameter = next(model.parameters())
        self._device = parameter.device
        #: Of the resident adapters' numbers.
        self.dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        self._output_name = _output_name(model)
        keep_weight_layout(model)
        for name, shape in self.linears.items():
            parent_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent_name), attribute, BankedLinear(model.get_submodule(name), shape, self))

    def __contains__(self, digest: str) -> bool:
        return digest in self.manifests

    def __len__(self) -> int:
        return len(self.manifests)

    @property
    def bytes(self) -> int:
        """What the resident rows take in memory."""
        return sum(pool.bytes for pool in self._pools.values())

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
        check_modules(self.linears, manifest)
        found = adapter_fingerprint(manifest.adapter, manifest.modules, self._base)
        check_fingerprint(manifest.fingerprint, found)

    def row_of(self, artifact: Artifact) -> Row:
        """An adapter as this bank would have it, without taking it in.

        Raises:
            ShapeError: its head is of another kind of model.
        """
        numbers = family_of(artifact.manifest.adapter, self._base).numbers(artifact)
        in_place = {name: tensor.to(self._device, self.dtype) for name, tensor in numbers.items()}
        # Ten thousand adapters of a service have the same few lists of modules, each larger than an adapter's vectors.
        modules = self._module_lists.setdefault(artifact.manifest.modules, artifact.manifest.modules)
        head = {} if self._heads is None else self._heads.parameters(artifact)
        return Row(artifact.manifest.model_copy(update={"modules": modules}), in_place, head)

    def put(self, artifact: Artifact) -> Row:
        """Make a checked adapter resident; one that is resident already stays as it is.

        Returns:
            its row, which the caller may keep, whatever becomes of it here.

        Raises:
            ShapeError: its head is of another kind of model.
        """
        resident = self.find(artifact.manifest.digest)
        if resident is not None:
            return resident
        row = self.row_of(artifact)
        with self._lock:
            resident = self.find(row.digest)
            if resident is not None:
                return resident
            for digest in self._take(row):
                del self.manifests[digest]
            return row

    def put_if_room(self, artifact: Artifact) -> bool:
        """Make a checked adapter resident unless another would have to go; it is the first to go later.

        Returns:
            whether it is resident.

        Raises:
            ShapeError: its head is of another kind of model.
        """
        if artifact.manifest.digest in self:
            return True
        row = self.row_of(artifact)
        with self._lock:
            if row.digest in self:
                return True
            pool = self._pool(row.manifest)
            if not pool.has_room(row):
                return False
            self._take(row)
            pool.rows.move_to_end(row.digest, last=False)
            return True

    def row(self, digest: str) -> Row:
        """A resident adapter's row, which the caller may keep.

        Raises:
            AdapterNotFoundError: it is not resident.
        """
        row = self.find(digest)
        if row is None:
            raise AdapterNotFoundError(f"Adapter {digest[:16]}... is not resident; put it into the bank first.")
        return row

    def find(self, digest: str) -> Row | None:
        """As `row`; None if it is not resident."""
        with self._lock:
            row = self.peek(digest)
            if row is not None:
                self._pool(self.manifests[digest]).rows.move_to_end(digest)
            return row

    def peek(self, digest: str) -> Row | None:
        """As `find`, without that the adapter counts as used."""
        with self._lock:
            manifest = self.manifests.get(digest)
            return None if manifest is None else self._pool(manifest).rows[digest]

    def digests(self) -> set[str]:
        """Those that are resident now."""
        with self._lock:
            return set(self.manifests)

    def remove(self, digest: str) -> None:
        """Let an adapter go, if it is resident. Requests that hold its row go on with it."""
        with self._lock:
            if digest in self:
                self._pool(self.manifests.pop(digest)).remove(digest)

    def _take(self, row: Row) -> list[str]:
        self.manifests[row.digest] = row.manifest
        return self._pool(row.manifest).put(row)

    def _pool(self, manifest: Manifest) -> _Pool:
        return self._pools[family_of(manifest.adapter, self._base).heavy]

    def compose(self, rows: Sequence[Row | None]) -> Composition:
        """Lay the rows of a batch side by side; None is the base model."""
        members: dict[ServingFamily, list[int]] = {}
        for place, row in enumerate(rows):
            if row is not None:
                members.setdefault(family_of(row.manifest.adapter, self._base), []).append(place)
        groups = []
        for family, places in members.items():
            batch = family.batch([row for place in places if (row := rows[place]) is not None])
            whole = len(places) == len(rows)
            groups.append(Group(batch, None if whole else torch.tensor(places, device=self._device)))
        return Composition(tuple(rows), tuple(groups))

    @contextmanager
    def serving(self, digests: Sequence[str | None]) -> Iterator[None]:
        """Within the context, row i of a forward's batch belongs to the adapter ``digests[i]``; None is the base.

        Raises:
            AdapterNotFoundError: a digest is not resident.
        """
        with self.running(self.compose([None if digest is None else self.row(digest) for digest in digests])):
            yield

    @contextmanager
    def running(self, composition: Composition, outputs: Composition | None = None) -> Iterator[None]:
        """Within the context, forwards are of this batch.

        Args:
            composition: the batch.
            outputs: the rows whose tokens the output embeddings are given, if not all.
        """
        self.composition, self._outputs = composition, outputs or composition
        try:
            yield
        finally:  # whatever happens, no later batch may see these rows
            self.composition = self._outputs = None

    def adapts_outputs(self, composition: Composition) -> bool:
        """Whether any row adapts the output embeddings."""
        return self._output_name is not None and composition.adapts(self._output_name)

    def add(self, modules: Modules, x: Tensor, out: Tensor) -> None:
        """Add the running batch's updates, as `Composition.add` does."""
        composition = self._outputs if self._output_name in modules.places else self.composition
        if composition is not None:
            composition.add(modules, x, out)


def _output_name(model: nn.Module) -> str | None:
    """The name of the output embeddings; None if there are none."""
    found: Any = cast(Any, model).get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is found), None) if found else None
