"""Training: ``train(spec, ...)`` and what it tells while it runs."""

from uora.training.observer import Evaluation, StepMetrics, TrainingObserver, TrainingResult, TrainingStopped
from uora.training.trainer import train

__all__ = [
    "Evaluation",
    "StepMetrics",
    "TrainingObserver",
    "TrainingResult",
    "TrainingStopped",
    "train",
]
