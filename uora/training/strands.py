"""Functions that run in turn, each until it waits for something: coroutines for code that knows nothing of them.

transformers' training loop cannot be left in the middle and entered again, so each loop has a stack of its own
(greenlet). They all run in one thread: in several, each would keep a team of threads for its products, which spin and
take the cores from one another. What libraries keep per process (random generators, accelerate's state of gradient
accumulation) is each loop's own: it is put away when the loop waits and brought back when it goes on. So a loop comes
to the same results as it would by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from accelerate.state import GradientState  # type: ignore[import-untyped]
from greenlet import greenlet

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
    """One function with a stack of its own, which runs only inside of `begin` and `resume`."""

    def __init__(self, run: Callable[[Callable[[Question], Answer]], Result]) -> None:
        """A strand that has not begun; ``run`` is given a function that asks and waits."""
        self._run = run
        self._stack = greenlet(self._main)
        self._globals = _Globals(RngState.capture(), {})  # a run seeds the generators itself

    def begin(self) -> Asked[Question] | Ended[Result]:
        """Run until it asks for the first time, or ends."""
        return self._switch()

    def resume(self, answer: Answer | Exception) -> Asked[Question] | Ended[Result]:
        """Let it go on with the answer, or with an error raised where it waits, until it asks again or ends."""
        return self._switch(answer)

    def _switch(self, *answer: Answer | Exception) -> Asked[Question] | Ended[Result]:
        outside = _Globals.take()
        self._globals.put_back()
        try:
            return cast(Asked[Question] | Ended[Result], self._stack.switch(*answer))
        finally:
            self._globals = _Globals.take()
            outside.put_back()

    def _main(self) -> Ended[Result]:
        try:
            return Ended(self._run(self._ask))
        except Exception as error:
            return Ended(error)

    def _ask(self, question: Question) -> Answer:
        answer = self._stack.parent.switch(Asked(question))
        if isinstance(answer, Exception):
            raise answer
        return cast(Answer, answer)


@dataclass(frozen=True)
class _Globals:
    """What libraries keep per process and a training loop changes."""

    rng: RngState
    accumulation: dict[str, Any]

    @classmethod
    def take(cls) -> _Globals:
        return cls(RngState.capture(), dict(GradientState._shared_state))

    def put_back(self) -> None:
        self.rng.restore()
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.accumulation)
