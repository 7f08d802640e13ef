"""Mixed batches: each row of a forward belongs to the adapter named for it, in every tuner of ours."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Self, TypeVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from uora.errors import AdapterNotFoundError
from uora.tuner._peft import BaseTuner, ModulesToSaveWrapper
from uora.tuner.pairs import Segment, SharedProducts

#: PEFT's name for "no adapter" in ``adapter_names``.
BASE = "__base__"

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class Joint:
    """A training forward whose tokens belong to adapters of several models (``uora.tuner.joining``).

    Attributes:
        members: the models' numbers, in the order of their segments.
        segments: the tokens of each, one after the other.
        owners: for every token the place of its model in ``members``, ``(tokens,)``.
    """

    members: tuple[int, ...]
    segments: tuple[Segment, ...]
    owners: Tensor

    @classmethod
    def of(cls, tokens: Mapping[int, int], *, device: torch.device) -> Self:
        """Of how many tokens each model has, in their order."""
        ends = list(accumulate(tokens.values(), initial=0))
        lengths = torch.tensor(list(tokens.values()), device=device)
        owners = torch.arange(len(tokens), device=device).repeat_interleave(lengths)
        return cls(tuple(tokens), tuple(Segment(*pair) for pair in pairwise(ends)), owners)


@dataclass
class RowAdapters:
    """Which adapter each row of the running forward belongs to; None outside a mixed batch.

    One instance is shared by a model and all its layers.
    """

    names: tuple[str, ...] | None = None
    #: Whose the tokens of a joint forward are; None outside of one.
    joint: Joint | None = None
    #: What layers with the same input share in training.
    products: SharedProducts = field(default_factory=SharedProducts)

    def groups(
        self, batch: int, group_of: Callable[[str], Group | None]
    ) -> Iterator[tuple[Group, list[int], list[str]]]:
        """Rows that can share a product, with their adapters' names.

        Args:
            batch: rows of the layer's input.
            group_of: what an adapter's rows can share; None if the layer has no update for it.

        Raises:
            AdapterNotFoundError: there is not one name per row.
        """
        names = self.names or ()
        if len(names) != batch:
            raise AdapterNotFoundError(f"adapter_names has {len(names)} names for {batch} rows; give one name per row.")
        found: dict[Group, tuple[list[int], list[str]]] = {}
        for row, name in enumerate(names):
            group = group_of(name)
            if group is not None:
                rows, members = found.setdefault(group, ([], []))
                rows.append(row)
                members.append(name)
        for group, (rows, members) in found.items():
            yield group, rows, members


class MixedBatchModel(BaseTuner):
    """A tuner whose ``forward`` and ``generate`` take ``adapter_names``, one per row; its layers share ``_rows``."""

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Runs for the first adapter only, once nn.Module is ready for attributes."""
        self._rows = RowAdapters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, with the adapters."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._rows.products.clear()

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each row of this forward the adapter named for it in ``adapter_names``."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_row_names(names)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        repeated = tuple(name for name in names for _ in range(copies))
        previous = self._rows.names
        self._rows.names = repeated
        try:
            with self._saved_modules_by_row(repeated):
                yield
        finally:  # a forward that raises must not answer the next request with this one's adapters
            self._rows.names = previous

    def _check_row_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("adapter_names works in inference only; call model.eval() first.")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise AdapterNotFoundError(
                f"Unknown adapters {unknown} in adapter_names; loaded are {sorted(self.peft_config)} and {BASE!r}."
            )
        if any(isinstance(module, self.tuner_layer_cls) and module.merged for module in self.model.modules()):
            raise ValueError("adapter_names cannot be used while an adapter is merged; unmerge first.")

    @contextmanager
    def _saved_modules_by_row(self, names: tuple[str, ...]) -> Iterator[None]:
        """Let every module in ``modules_to_save`` (a classifier, say) answer each row with that row's own copy."""
        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    hooks.enter_context(module.register_forward_hook(_by_row(names), with_kwargs=True))
            yield


def _by_row(names: tuple[str, ...]) -> Callable[..., Tensor]:
    """A forward hook that answers each row from its adapter's copy, or from the base model's module."""

    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, *rest = args
        copies = dict(module.modules_to_save.items())
        result = torch.empty_like(output)
        for name in set(names):
            rows = [row for row, row_name in enumerate(names) if row_name == name]
            result[rows] = copies.get(name, module.original_module)(x[rows], *rest, **kwargs)
        return result

    return hook
