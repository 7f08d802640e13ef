"""Answers that wait for a row, project by project: one tenant's flood does not starve another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import NamedTuple

from uora.artifact import Artifact
from uora.serving.generation import Generation


class Waiting(NamedTuple):
    """An answer to be generated, and its adapter if that has to be made resident before."""

    generation: Generation
    artifact: Artifact | None


class FairQueue:
    """Max-min fair between projects; within a project first come, first served. Not thread-safe."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Waiting]] = {}  # of projects that have some waiting
        self._turns: dict[str, int] = {}  # project -> number of its last turn
        self._turn = count(1)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def waiting_of(self, project: str) -> int:
        """How many of a project's answers wait."""
        return len(self._queues.get(project, ()))

    def extend(self, items: Iterable[Waiting]) -> None:
        """Put answers behind those of their project."""
        for item in items:
            self._queues.setdefault(item.generation.project, deque()).append(item)

    def pop(self, running: Mapping[str, int]) -> Waiting:
        """The next answer: of the project with the fewest running; of several, the one whose turn was longest ago.

        Args:
            running: project -> how many of its answers run; none of a project that is not in it.

        Raises:
            ValueError: nobody waits.
        """
        project = min(self._queues, key=lambda name: (running.get(name, 0), self._turns.get(name, 0)))
        item = self._queues[project].popleft()
        self._turns[project] = next(self._turn)
        self._forget_empty()
        return item

    def remove(self, unwanted: Callable[[Generation], bool]) -> list[Generation]:
        """Take out the answers that are ``unwanted``, and return them."""
        gone = []
        for project, queue in self._queues.items():
            kept: deque[Waiting] = deque()
            for item in queue:
                if unwanted(item.generation):
                    gone.append(item.generation)
                else:
                    kept.append(item)
            self._queues[project] = kept
        self._forget_empty()
        return gone

    def _forget_empty(self) -> None:
        self._queues = {project: queue for project, queue in self._queues.items() if queue}
        if not self._queues:
            self._turns.clear()  # whoever comes now finds nobody to take turns with
