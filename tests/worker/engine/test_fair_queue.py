"""Whose answer is next."""

from __future__ import annotations

from collections import Counter

import pytest

from uora.serving.generation import Generation
from uora.serving.sampling import Sampling
from worker.engine.fair_queue import FairQueue, Waiting


def waiting(project: str, number: int = 0) -> Waiting:
    return Waiting(Generation([number], None, 4, Sampling(), lambda _: None, project=project), None)


def queue_of(projects: str) -> FairQueue:
    queue = FairQueue()
    queue.extend(waiting(project, number) for number, project in enumerate(projects))
    return queue


def turns(queue: FairQueue, running: Counter[str], *, rows: int | None = None) -> str:
    """The projects in the order in which they get ``rows``, all of which go on running."""
    order = ""
    for _ in range(len(queue) if rows is None else rows):
        project = queue.pop(running).generation.project
        running[project] += 1
        order += project
    return order


@pytest.mark.parametrize(
    ("projects", "running", "order"),
    [
        ("aaaa", {}, "aaaa"),
        ("aaaab", {}, "abaaa"),
        ("aaaabb", {"a": 3}, "bbaaaa"),
        ("aabbcc", {"a": 1, "c": 1}, "bacbac"),
        ("aaaabb", {"other": 9}, "ababaa"),
    ],
)
def test_the_project_with_the_fewest_running_is_next(projects: str, running: dict[str, int], order: str) -> None:
    assert turns(queue_of(projects), Counter(running)) == order


def test_equal_ones_take_turns_though_nothing_runs_on() -> None:
    queue = queue_of("aaabbb")
    assert [queue.pop({}).generation.project for _ in range(3)] == ["a", "b", "a"]
    queue.extend([waiting("c")])
    assert [queue.pop({}).generation.project for _ in range(4)] == ["c", "b", "a", "b"]


def test_coming_back_one_by_one_wins_no_turns() -> None:
    queue = queue_of("xaaabbb")
    order = ""
    while len(queue) > 1:
        project = queue.pop({}).generation.project
        order += project
        if project == "x":
            queue.extend([waiting("x")])
    assert order == "xabxabxab"


def test_within_a_project_first_come_first_served() -> None:
    queue = queue_of("abaabab")
    served = [queue.pop({}).generation for _ in range(len(queue))]
    for project in "ab":
        numbers = [item.prompt[0] for item in served if item.project == project]
        assert numbers == sorted(numbers)


def test_removed_ones_hold_no_places() -> None:
    queue = queue_of("aabbc")
    gone = queue.remove(lambda generation: generation.project in "ac")
    assert sorted(item.project for item in gone) == ["a", "a", "c"]
    assert (len(queue), queue.waiting_of("a"), queue.waiting_of("b")) == (2, 0, 2)
    assert turns(queue, Counter()) == "bb"
    with pytest.raises(ValueError, match="empty"):
        queue.pop({})
