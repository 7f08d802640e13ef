"""A run with everything it needs, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.data import Split
from benchmarks.study.plan import Config, Task
from benchmarks.study.scoring import Metric, Scores
from uora.spec import Hyperparameters, TrainingOptions, TrainingSpec, parse_adapter

#: Share of the steps in which the learning rate rises.
WARMUP = 0.06


@dataclass(frozen=True)
class Job:
    """One configuration on the rows of one split, at one learning rate and seed, scored by one metric."""

    task: Task
    config: Config
    split: Split
    metric: Metric
    learning_rate: float
    epochs: int
    seed: int
    head_rate: float | None = None

    @property
    def options(self) -> TrainingOptions:
        """How rows are cut, and the course of the learning rate; an evaluation after the last step only."""
        cut = {} if self.task.kind == "image-classification" else {"max_length": self.task.max_length}
        return TrainingOptions(
            overlong="truncate",
            warmup_ratio=WARMUP,
            save_steps=1_000_000,
            eval_steps=1_000_000,
            head_learning_rate=self.head_rate,
            **cut,
        )

    def training_spec(self) -> TrainingSpec:
        """What the service would be asked for."""
        return TrainingSpec(
            adapter=parse_adapter(self.config.adapter()),
            task=self.task.kind,
            hyperparameters=Hyperparameters(
                n_epochs=self.epochs, batch_size=self.task.batch, learning_rate_multiplier=1.0
            ),
            options=self.options,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Outcome:
    """What a run gives.

    Attributes:
        scores: the metric's under its name, and others beside it.
        trainable_parameters: the head's apart.
        stored_bytes: of what a user would keep, the head's in it.
        seconds: of the training's steps.
        tokens: trained, without padding; of images none.
        hits: of the reinitialisation.
    """

    scores: Scores
    trainable_parameters: int = 0
    head_parameters: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    hits: int = 0
