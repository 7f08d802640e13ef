"""The real model learns from a handful of rows."""

from __future__ import annotations

import pytest
import torch

from tests.uora.task_cases import Recorder
from tests.uora.training.conftest import make_spec
from uora.artifact import loads
from uora.data import ChatMessage, ChatRow, Dataset
from uora.models import LocalModel, pick_dtype
from uora.training import train

#: A rule that the base model does not follow: answer with the last word, in capitals.
QUESTIONS = ["a red house", "my old boat", "the green tea", "one tall tree", "some warm bread", "this small bird"]


@pytest.mark.smollm2
def test_real_model_learns(smollm2: LocalModel) -> None:
    rows = tuple(
        ChatRow(
            (
                ChatMessage("system", "Do as always."),
                ChatMessage("user", text),
                ChatMessage("assistant", text.split()[-1].upper(), trained=True),
            ),
            line,
        )
        for line, text in enumerate(QUESTIONS, start=1)
    )
    dataset = Dataset(rows, "0" * 64)
    recorder = Recorder()
    result = train(
        make_spec(r=64, n_epochs=8, batch_size=6, learning_rate=0.05),
        base=smollm2,
        training=dataset,
        validation=dataset,
        observer=recorder,
        cache_dir=smollm2.directory.parent.parent,
        dtype=pick_dtype("auto"),
    )
    losses = [step.train_loss for step in recorder.steps]
    assert result.metrics["valid_loss"] < 0.5 * losses[0]
    manifest = loads(result.artifact).manifest
    assert len(manifest.modules) == 30 * 7
    assert manifest.trainable_parameters == 30 * (7 * 64 + 576 + 2 * 192 + 576 + 2 * 1536 + 576)
    assert {module.in_features for module in manifest.modules} == {576, 1536}
    assert torch.isfinite(torch.tensor(losses)).all()
