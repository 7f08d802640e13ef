"""Functions that run in turn, each until it waits for something: coroutines for code that knows nothing of them.

transformers' training loop cannot be left in the middle and entered again, so each loop has a thread. But only one
thread runs at any time, and what libraries keep per process (random generators, accelerate's state of gradient
accumulation) is each loop's own: it is put away when the loop waits and brought back when it goes on. So a loop comes
to the same results as it would by itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from accelerate.state import GradientState  # type: ignore[import-untyped]

from uora.training.state import RngState

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked(Generic[Question]):
    """The strand waits for an answer."""

    question: Question


@dataclass(frozen=True)
class Ended(Generic[Result]):
    """The strand is over, with its result or the error that ended it."""

    outcome: Result | Exception


class Strand(Generic[Question, Answer, Result]):
    """One function in a thread of its own, which runs only inside of `resume`."""

    def __init__(self, run: Callable[[Callable[[Question], Answer]], Result]) -> None:
        """A strand that has not begun; ``run`` is given a function that asks and waits."""
        self._run = run
        self._answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Asked[Question] | Ended[Result]] = queue.SimpleQueue()
        self._globals = _Globals.fresh()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def begin(self) -> Asked[Question] | Ended[Result]:
        """Run until it asks for the first time, or ends."""
        self._thread.start()
        return self._turn(None)

    def resume(self, answer: Answer | Exception) -> Asked[Question] | Ended[Result]:
        """Let it go on with the answer, or with an error raised where it waits, until it asks again or ends."""
        return self._turn(answer)

    def _turn(self, answer: Answer | Exception | None) -> Asked[Question] | Ended[Result]:
        outside = _Globals.take()
        self._globals.put_back()
        self._answers.put(cast(Any, answer))
        said = self._said.get()
        self._globals = _Globals.take()
        outside.put_back()
        return said

    def _main(self) -> None:
        self._answers.get()
        try:
            self._said.put(Ended(self._run(self._ask)))
        except Exception as error:
            self._said.put(Ended(error))

    def _ask(self, question: Question) -> Answer:
        self._said.put(Asked(question))
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer


@dataclass(frozen=True)
class _Globals:
    """What libraries keep per process and a training loop changes."""

    rng: RngState
    accumulation: dict[str, Any]

    @classmethod
    def fresh(cls) -> _Globals:
        """As a loop finds it that is the first of its process; it seeds the generators itself."""
        return cls(RngState.capture(), {})

    @classmethod
    def take(cls) -> _Globals:
        return cls(RngState.capture(), dict(GradientState._shared_state))

    def put_back(self) -> None:
        self.rng.restore()
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.accumulation)
