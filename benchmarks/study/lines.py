"""The results: a JSON object a line, in the order in which runs ended; nothing is ever changed, only added."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Line:
    """One run.

    Attributes:
        key: names the run (``benchmarks.study.plan``).
        part: of the study.
        r, targets: None where a method has none.
        settings: of the reinitialisation, where they are not the default.
        purpose: ``tune`` or ``head`` on a split of train, or ``test``.
        rows, test_rows: how many were trained on, and scored.
        score: by ``metric``; ``scores`` has what else was measured.
        trainable_parameters: without the head's.
        stored_bytes: of the whole adapter, its head in it.
        seconds: of the training's steps, on this machine with so many threads: not to be compared with another's.
        together: how many runs were trained in one training, which have each the same share of the seconds.
        tokens: trained, without padding, counted again in every epoch; 0 for images.
        hits: of the reinitialisation.
        command: makes this run again.
    """

    key: str
    part: str
    task: str
    base: str
    method: str
    r: int | None
    targets: str | None
    settings: dict[str, Any]
    purpose: str
    seed: int
    learning_rate: float
    head_learning_rate: float | None
    epochs: int
    batch: int
    rows: int
    test_rows: int
    metric: str
    score: float
    scores: dict[str, float]
    trainable_parameters: int
    head_parameters: int
    stored_bytes: int
    seconds: float
    total_seconds: float
    tokens: int
    steps: int
    hits: int
    dtype: str
    threads: int
    machine: str
    command: str
    together: int = 1


@dataclass
class Lines:
    """All lines of a file, found by their runs' keys."""

    path: Path | None = None
    _by_key: dict[str, Line] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a file, which need not be there. A last line that was cut off by a crash is left out.

        Raises:
            ValueError: a line is none of ours; names it.
        """
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        *whole, rest = text.split("\n")
        if rest:
            path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
        found = cls(path)
        found._by_key = {line.key: line for line in (_parse(path, i, each) for i, each in enumerate(whole, start=1))}
        return found

    @classmethod
    def of(cls, lines: Iterable[Line]) -> Self:
        """These."""
        return cls(None, {line.key: line for line in lines})

    def __len__(self) -> int:
        return len(self._by_key)

    def all(self) -> list[Line]:
        """In the order of the file."""
        return list(self._by_key.values())

    def find(self, key: str) -> Line | None:
        """The line of a run, if it was made."""
        return self._by_key.get(key)

    def add(self, line: Line) -> None:
        """Keep it, and write it down."""
        self._by_key[line.key] = line
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")


def _parse(path: Path, number: int, text: str) -> Line:
    try:
        return Line(**json.loads(text))
    except (ValueError, TypeError) as error:
        names = ", ".join(each.name for each in fields(Line))
        raise ValueError(f"{path}, line {number}: {error}. Expected an object with {names}.") from error
