"""A small run of every task on a tiny base model, for tests of training and of serving."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from tests.tiny import make_tiny_bert, make_tiny_llama, make_tiny_vit
from uora.artifact import Artifact, loads
from uora.data import ChatMessage, ChatRow, CompletionRow, Dataset, ImageRow, Row, TextRow
from uora.models import LocalModel
from uora.spec import Hyperparameters, MethodName, Task, TrainingSpec, parse_adapter
from uora.training import Evaluation, StepMetrics, TrainingResult, train

FRUIT, TOOLS = ("pear", "plum", "fig"), ("saw", "axe", "drill")


@dataclass
class Recorder:
    """An observer that keeps what it is told, and stops after ``stop_after`` questions."""

    stop_after: int | None = None
    total_steps: list[int] = field(default_factory=list)
    steps: list[StepMetrics] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    states: dict[int, bytes] = field(default_factory=dict)
    questions: int = 0

    def on_start(self, total_steps: int) -> None:
        self.total_steps.append(total_steps)

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def on_state(self, step: int, state: bytes) -> None:
        self.states[step] = state

    def should_stop(self) -> bool:
        self.questions += 1
        return self.stop_after is not None and self.questions > self.stop_after


@dataclass(frozen=True)
class Case:
    """A task with its rows on a kind of base model."""

    task: Task
    make_base: Callable[[Path], Path]
    rows: tuple[Row, ...]
    n_epochs: int = 5

    @property
    def dataset(self) -> Dataset[Row]:
        return Dataset(self.rows, "d" * 64)


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    case: Case
    base: LocalModel
    spec: TrainingSpec
    result: TrainingResult
    recorder: Recorder

    @property
    def artifact(self) -> Artifact:
        return loads(self.result.artifact)


def _chat(i: int) -> ChatRow:
    question, answer = (" ".join(words[: 1 + i % 3]) for words in ((FRUIT, TOOLS) if i % 2 else (TOOLS, FRUIT)))
    return ChatRow((ChatMessage("user", question), ChatMessage("assistant", answer, trained=True)), i + 1)


def _completion(i: int) -> CompletionRow:
    return CompletionRow("in the " * (1 + i % 3), "yes" if i % 2 else "no, not so", i + 1)


def _words(i: int) -> str:
    return " ".join((FRUIT if i % 2 else TOOLS)[j % 3] for j in range(i, i + 1 + i % 4))


def _text(i: int) -> TextRow:
    return TextRow(_words(i), None, "fruit" if i % 2 else "tool", i + 1)


def _pair(i: int) -> TextRow:
    label = "same" if i % 2 == i // 2 % 2 else ("fruit first" if i % 2 else "tool first")
    return TextRow(_words(i), _words(i // 2), label, i + 1)


def _number(i: int) -> TextRow:
    return TextRow(_words(i), None, 200.0 + 40.0 * (i % 2) + 5.0 * (i % 3), i + 1)


def _image(i: int) -> ImageRow:
    kind = i % 3
    image = Image.new("RGB", (20 + i % 5, 18), ((40, 40, 40), (230, 60, 60), (60, 60, 230))[kind])
    image.paste((128 + i, 128, 128), (2, 2, 6 + i % 7, 9))
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageRow(file.getvalue(), ("dark", "red", "blue")[kind], i + 1)


def _rows(make: Callable[[int], Row], n_rows: int = 18) -> tuple[Row, ...]:
    return tuple(make(i) for i in range(n_rows))


CASES: dict[str, Case] = {
    "chat": Case("chat", make_tiny_llama, _rows(_chat)),
    "completion": Case("completion", make_tiny_llama, _rows(_completion)),
    "classification": Case("classification", make_tiny_bert, _rows(_text)),
    "pairs": Case("classification", make_tiny_bert, _rows(_pair)),
    "regression": Case("regression", make_tiny_bert, _rows(_number), n_epochs=15),
    "decoder": Case("classification", make_tiny_llama, _rows(_text)),
    "image-classification": Case("image-classification", make_tiny_vit, _rows(_image)),
}


def spec_of(
    task: Task, method: MethodName, *, n_epochs: int = 5, batch_size: int = 6, **adapter: object
) -> TrainingSpec:
    """A short run of a method at its own learning rate."""
    chosen = parse_adapter({"method": method, "r": 4} | adapter)
    return TrainingSpec(
        adapter=chosen,
        task=task,
        hyperparameters=Hyperparameters(n_epochs=n_epochs, batch_size=batch_size, learning_rate_multiplier=1.0),
        learning_rate=chosen.base_learning_rate,
        seed=0,
    )


def run(spec: TrainingSpec, base: LocalModel, case: Case, *, dtype: torch.dtype = torch.float32) -> Trained:
    """Train on a case's rows and evaluate on them."""
    recorder = Recorder()
    result = train(
        spec,
        base=base,
        training=case.dataset,
        validation=case.dataset,
        observer=recorder,
        cache_dir=None,
        dtype=dtype,
    )
    return Trained(case, base, spec, result, recorder)


#: Trains a case with a method, once however often it is asked for.
TrainCase = Callable[[str, MethodName], Trained]


def train_cases(base_of: Callable[[Callable[[Path], Path]], LocalModel]) -> TrainCase:
    """A `TrainCase` on base models that ``base_of`` makes from a maker of ``tests.tiny``."""

    @cache
    def trained(name: str, method: MethodName) -> Trained:
        case = CASES[name]
        return run(spec_of(case.task, method, n_epochs=case.n_epochs), base_of(case.make_base), case)

    return trained
