"""The classes of a classification, and the numbers of a regression."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from uora.data.values import shown
from uora.errors import DataError


@dataclass(frozen=True)
class Labels:
    """Names of classes, in the order of the model's outputs."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, found: Iterable[str]) -> Labels:
        """All that a training file has, sorted.

        Raises:
            DataError: there are fewer than two (code ``too_few_labels``).
        """
        names = tuple(sorted(set(found)))
        if len(names) < 2:
            raise DataError(
                f"found {len(names)} label ({', '.join(map(shown, names))}) in the whole file; expected rows of at "
                "least two classes to tell apart.",
                code="too_few_labels",
            )
        return cls(names)

    def index(self, label: str) -> int:
        """The output of a class.

        Raises:
            DataError: the training file has no such label (code ``unknown_label``).
        """
        try:
            return self.names.index(label)
        except ValueError as error:
            raise DataError(
                f"the label {shown(label)} is none of the training file's ({_first(self.names)}). Add rows with it to "
                "the training file, or take it out here.",
                code="unknown_label",
            ) from error


@dataclass(frozen=True)
class Scale:
    """Where a training file's numbers lie: ``number = mean + deviation * z`` with z of mean 0 and deviation 1."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Scale:
        """Mean and standard deviation of at least one number; a deviation of 1 where all are the same."""
        return cls(statistics.fmean(numbers), statistics.pstdev(numbers) or 1.0)


def _first(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more
