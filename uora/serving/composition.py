"""Whose row stands where in a batch.

Everything that a step needs is laid out when requests join or leave. What is left for each layer of each step are the
products, and as few operations around them as there can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from uora.serving.families import FamilyBatch
from uora.serving.rows import Row

#: Adds updates to ``out (rows, n, outs)``, of modules that all read ``x (rows, n, in)``.
_Adding = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Modules:
    """Modules that read the same input, with their places among the outputs, in their order. Equal to itself alone."""

    places: Mapping[str, slice]


@dataclass(frozen=True)
class Group:
    """The rows of one batch that belong to one family."""

    batch: FamilyBatch
    places: Tensor | None  # (k,) their places in the batch; None when they are the whole batch

    def adding(self, modules: Modules) -> _Adding | None:
        """What adds these rows' updates; None if no row adapts any of the modules."""
        adapted = {module: place for module, place in modules.places.items() if module in self.batch}
        if not adapted:
            return None
        update = self.batch.updates(tuple(adapted))
        parts = list(_neighbours(adapted.values()))

        def add(x: Tensor, out: Tensor) -> None:
            found, factor = update(x if self.places is None else x.index_select(0, self.places))
            for part, place in parts:
                self._add(out[..., place], found[..., part], None if factor is None else factor[..., part])

        return add

    def _add(self, out: Tensor, update: Tensor, factor: Tensor | None) -> None:
        if self.places is not None:
            out.index_add_(0, self.places, update if factor is None else update * factor)
        elif factor is None:
            out.add_(update)
        else:
            out.addcmul_(update, factor)

    def spread(self, lengths: Sequence[int]) -> Group:
        """For a batch that is its tokens end to end."""
        if self.places is None:
            return Group(self.batch.spread(lengths), None)
        starts = list(accumulate(lengths, initial=0))
        members = self.places.tolist()
        tokens = [place for row in members for place in range(starts[row], starts[row + 1])]
        batch = self.batch.spread([lengths[row] for row in members])
        return Group(batch, torch.tensor(tokens, device=self.places.device))


def _neighbours(places: Iterable[slice]) -> Iterable[tuple[slice, slice]]:
    """Places in their order, those that touch as one, each after its part of what lies side by side."""
    found: list[slice] = []
    for place in places:
        if found and found[-1].stop == place.start:
            found[-1] = slice(found[-1].start, place.stop)
        else:
            found.append(place)
    start = 0
    for place in found:
        part = slice(start, start + place.stop - place.start)
        yield part, place
        start = part.stop


@dataclass(frozen=True)
class Composition:
    """Whose row stands where in a batch: made when requests join or leave, used for all steps in between."""

    rows: tuple[Row | None, ...]
    groups: tuple[Group, ...]
    #: Tokens of each row where a batch is its tokens end to end; None where the rows are the first dimension.
    lengths: tuple[int, ...] | None = None
    _adding: dict[Modules, list[_Adding]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def size(self) -> int:
        """Rows, or tokens where the batch is its tokens end to end."""
        return len(self.rows) if self.lengths is None else sum(self.lengths)

    def adapts(self, module: str) -> bool:
        """Whether any row adapts it."""
        return any(module in group.batch for group in self.groups)

    def spread(self, lengths: Sequence[int]) -> Composition:
        """For a batch that is its tokens end to end, ``lengths[i]`` of row i."""
        if max(lengths, default=1) == 1:
            return Composition(self.rows, self.groups, tuple(lengths), self._adding)
        return Composition(self.rows, tuple(group.spread(lengths) for group in self.groups), tuple(lengths))

    def add(self, modules: Modules, x: Tensor, out: Tensor) -> None:
        """Add each row's own update to the outputs ``(..., outs)`` of modules that all read ``x (..., in)``."""
        adding = self._adding.get(modules)
        if adding is None:
            found = [group.adding(modules) for group in self.groups]
            adding = self._adding[modules] = [add for add in found if add is not None]
        if adding:
            x = x.reshape(self.size, -1, x.shape[-1])
            out = out.view(self.size, -1, out.shape[-1])
            for add in adding:
                add(x, out)
