"""What a training child is told, and what it tells: one JSON object a line, on its stdin and on its stdout.

No secret and no database address is among it. Numbers that are not finite arrive as None: JSON has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from uora.spec import TrainingSpec
from worker.failures import Failure

#: Measurements by OpenAI's names; None where the number was not finite.
Metrics = dict[str, float | None]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class Run(_Message):
    """One training run."""

    spec: TrainingSpec
    training_file: Path
    validation_file: Path | None
    #: The state to go on from; None to begin with step 1.
    resume: Path | None
    #: The adapter to begin with instead of a new one.
    warm_start: Path | None
    #: Folder for the run's results.
    work_dir: Path


class ChildRequest(_Message):
    """Runs on one base model, trained together where they can be."""

    #: At least one; reports and stops name a run by its place here.
    runs: tuple[Run, ...]
    base_model: str
    #: Where the base model comes from (see ``uora.models``).
    base_source: str
    #: Folder with those of the runs, removed by the parent.
    work_dir: Path
    cache_dir: Path
    dtype: str
    #: Of each process; 0 leaves torch's own choice, divided by ``processes``.
    torch_threads: int
    #: That share each batch; several train one run and no more.
    processes: int = 1
    #: Which of them the child is; the first, 0, starts the others.
    rank: int = 0


class Stop(_Message):
    """After the request: one run is to end its step, report its state and stop, and the others go on."""

    stop: int


class _Report(_Message):
    """What happened to one run."""

    run: int = 0


class Started(_Report):
    """Everything is loaded, the first step begins."""

    type: Literal["started"] = "started"
    total_steps: int


class Step(_Report):
    """One optimizer step is done (``uora.training.StepMetrics``)."""

    type: Literal["step"] = "step"
    step: int
    total_steps: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    learning_rate: float | None
    gradient_norm: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    hits: int
    trained_tokens: int


class Evaluated(_Report):
    """An evaluation is done; the adapter as it was then lies in ``file`` of the work folder."""

    type: Literal["evaluation"] = "evaluation"
    step: int
    metrics: Metrics
    file: str


class State(_Report):
    """What a run can go on from after ``step`` lies, whole, in ``file`` of the work folder."""

    type: Literal["state"] = "state"
    step: int
    file: str


class Stopped(_Report):
    """The run stopped because it was asked to; the state of its last step was reported before."""

    type: Literal["stopped"] = "stopped"


class Done(_Report):
    """The run is complete; the adapter lies in ``file`` of the work folder."""

    type: Literal["done"] = "done"
    file: str
    trained_tokens: int
    steps: int
    hits: int
    metrics: Metrics
    #: Whether there would have been more steps.
    stopped_early: bool


class Failed(_Report):
    """The run ended with an error."""

    type: Literal["failed"] = "failed"
    failure: Failure


Report = Annotated[Started | Step | Evaluated | State | Stopped | Done | Failed, Field(discriminator="type")]
_reports: TypeAdapter[Report] = TypeAdapter(Report)


def parse_report(line: str) -> Report:
    """Read one line of a child's stdout."""
    return _reports.validate_json(line)
