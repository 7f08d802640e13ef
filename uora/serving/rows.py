"""Resident adapters, and those of one batch laid side by side.

A row is never changed: a request holds the row that it began with, whatever is replaced, deleted or evicted meanwhile,
and no memory is ever given from one adapter to another while a batch can still read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from uora.artifact import Manifest
from uora.layout import ModuleShape


@dataclass(frozen=True, eq=False)
class Row:
    """One adapter as a batch needs it.

    Attributes:
        manifest: says which adapter it is.
        numbers: ``(modules, k)`` where every module has equally many, else flat, module after module.
        head: a classifier's own parameters of the head, by their names in the model.
    """

    manifest: Manifest
    numbers: Mapping[str, Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the stored adapter."""
        return self.manifest.digest

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for part in (self.numbers, self.head) for tensor in part.values())

    def equals(self, other: Row) -> bool:
        """Whether the numbers are the same to the bit."""
        return _all_same(self.numbers, other.numbers) and _all_same(self.head, other.head)


def _all_same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(_same_bits(tensor, others[name]) for name, tensor in some.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike `torch.equal`, which takes -0 for 0 and no NaN for another."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class Stack:
    """The numbers of several rows side by side; a module or a number that a row does not have is zero there."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Of rows of one family; the modules are those that any of them has."""
        self._rows = rows
        shapes: dict[str, ModuleShape] = {}
        for row in rows:
            if row.manifest.modules is not rows[0].manifest.modules or not shapes:
                shapes.update((module.name, module) for module in row.manifest.modules)
        self.shapes = shapes

    @cached_property
    def index(self) -> dict[str, int]:
        """Each module's place."""
        return {name: i for i, name in enumerate(self.shapes)}

    @cached_property
    def _alike(self) -> bool:
        """Whether all rows have the same modules in the same order, as those of a service's defaults do."""
        names = list(self.shapes)
        return all([module.name for module in row.manifest.modules] == names for row in self._rows)

    def has(self, name: str) -> bool:
        """Whether any row has these numbers."""
        return any(name in row.numbers for row in self._rows)

    def stacked(self, name: str) -> Tensor:
        """Numbers of which every module has equally many, ``(rows, modules, k)``."""
        like = next(row.numbers[name] for row in self._rows if name in row.numbers)
        if self._alike and all(name in row.numbers for row in self._rows):
            return torch.stack([row.numbers[name] for row in self._rows])
        found = like.new_zeros(len(self._rows), len(self.shapes), like.shape[-1])
        for place, row in enumerate(self._rows):
            if name in row.numbers:
                modules = [self.index[module.name] for module in row.manifest.modules]
                found[place, modules] = row.numbers[name]
        return found

    def flat(self, name: str, size: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Numbers that lie module after module: each module's, ``(rows, *size)``."""
        if self._alike:
            whole = torch.stack([row.numbers[name] for row in self._rows])
            return _split(whole, list(self.shapes.values()), size)
        own = [_split(row.numbers[name].unsqueeze(0), row.manifest.modules, size) for row in self._rows]
        like = self._rows[0].numbers[name]
        return {
            module: torch.cat([parts.get(module, like.new_zeros(1, *size[module])) for parts in own])
            for module in self.shapes
        }


def _split(whole: Tensor, modules: Sequence[ModuleShape], size: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    found, start = {}, 0
    for module in modules:
        end = start + prod(size[module.name])
        found[module.name] = whole[:, start:end].view(-1, *size[module.name])
        start = end
    return found
