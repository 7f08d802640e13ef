"""Whole runs on the tiny Llama."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.uora.task_cases import Recorder
from tests.uora.training.conftest import Run, make_dataset, make_spec
from uora.artifact import loads
from uora.data import ChatMessage, ChatRow, Dataset, encode_chat, template_sha256
from uora.errors import DataError, TargetError, UoraError
from uora.methods import load_artifact
from uora.models import LocalModel, load_model, load_tokenizer
from uora.svd import BaseWeights
from uora.training import TrainingStopped, batches, callbacks, passes, trainer
from uora.training.callbacks import DivergenceCallback, LatestGradient, RunClock
from uora.training.loss import LearnedTokenLoss
from uora.training.trainer import evaluation_epochs
from uora.tuner import reinitialise


def test_loss_goes_down(run: Run) -> None:
    recorder = Recorder()
    result = run(make_spec(n_epochs=12, learning_rate=0.2), make_dataset(16), observer=recorder)
    first, last = recorder.steps[0], recorder.steps[-1]
    assert last.train_loss < 0.6 * first.train_loss
    assert last.train_mean_token_accuracy > first.train_mean_token_accuracy
    assert result.metrics["train_loss"] == last.train_loss


def test_observer_is_told_of_every_step(run: Run, tiny_base: LocalModel) -> None:
    recorder = Recorder()
    dataset = make_dataset(10)
    result = run(make_spec(n_epochs=2, batch_size=4), dataset, observer=recorder)

    assert recorder.total_steps == [6]  # 10 rows in batches of 4, twice
    assert [step.step for step in recorder.steps] == [1, 2, 3, 4, 5, 6]
    assert {step.total_steps for step in recorder.steps} == {6}
    assert [step.learning_rate for step in recorder.steps] == pytest.approx(
        [0.05 * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    )
    tokenizer = load_tokenizer(tiny_base)
    tokens = sum(len(encode_chat(row, tokenizer).input_ids) for row in dataset.rows)
    assert recorder.steps[2].trained_tokens == tokens
    assert recorder.steps[-1].trained_tokens == result.trained_tokens == 2 * tokens
    assert all(step.tokens_per_second > 0 for step in recorder.steps)
    assert [step.seconds_left > 0 for step in recorder.steps[:-1]] == [True] * 5
    assert result.steps == 6


def test_artifact_names_what_it_came_from(run: Run, tiny_base: LocalModel) -> None:
    dataset = make_dataset(8, sha256="ab" * 32)
    result = run(make_spec(r=5, frame_seed=3, targets=("q_proj", "v_proj")), dataset)
    manifest = loads(result.artifact).manifest
    assert (manifest.base_model, manifest.base_digest) == (tiny_base.name, tiny_base.digest)
    assert manifest.data_sha256 == "ab" * 32
    assert manifest.chat_template_sha256 == template_sha256(load_tokenizer(tiny_base))
    assert (manifest.adapter.r, manifest.adapter.frame_seed) == (5, 3)
    assert {module.name.rsplit(".", 1)[-1] for module in manifest.modules} == {"q_proj", "v_proj"}
    assert manifest.metrics == result.metrics


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"tau": 0.099, "count_k": 2}])
def test_same_seed_same_bits(run: Run, changes: dict[str, Any]) -> None:
    spec = make_spec(**changes)
    results = [run(spec, make_dataset(12), validation=make_dataset(5)) for _ in range(2)]
    assert results[0].artifact == results[1].artifact
    other = run(make_spec(**changes, seed=1), make_dataset(12), validation=make_dataset(5))
    assert other.artifact != results[0].artifact


def test_validation_metrics_against_the_models_own_loss(run: Run, tiny_base: LocalModel) -> None:
    """The reported numbers are those of the stored adapter, counted by hand row by row."""
    validation = make_dataset(7)
    recorder = Recorder()
    run(make_spec(n_epochs=3), make_dataset(12), validation=validation, observer=recorder)
    tokenizer = load_tokenizer(tiny_base)
    assert [evaluation.step for evaluation in recorder.evaluations] == [3, 6, 9]
    for evaluation in recorder.evaluations:
        base = load_model(tiny_base, dtype=torch.float32, device="cpu")
        weights = BaseWeights.of_model(base)
        model = load_artifact(base, loads(evaluation.artifact), base=weights).eval()
        loss_sum, correct, tokens = 0.0, 0, 0
        for row in validation.rows:
            example = encode_chat(row, tokenizer)
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            with torch.no_grad():
                outputs = model(input_ids=ids, labels=labels)
            learned = labels[0, 1:] != -100
            loss_sum += outputs.loss.item() * int(learned.sum())
            correct += int((outputs.logits[0, :-1].argmax(-1) == labels[0, 1:])[learned].sum())
            tokens += int(learned.sum())
        metrics = evaluation.metrics
        assert metrics["valid_loss"] == metrics["full_valid_loss"] == pytest.approx(loss_sum / tokens, abs=1e-5)
        assert metrics["valid_mean_token_accuracy"] == pytest.approx(correct / tokens)
        assert metrics["full_valid_mean_token_accuracy"] == metrics["valid_mean_token_accuracy"]
        at_step = recorder.steps[evaluation.step - 1]
        assert metrics["step"] == evaluation.step
        assert metrics["train_loss"] == at_step.train_loss
        assert metrics["train_mean_token_accuracy"] == at_step.train_mean_token_accuracy


def test_train_loss_is_that_of_the_steps_own_batch(run: Run) -> None:
    """With all rows in one batch, the second step starts where the first evaluation was made."""
    recorder = Recorder()
    dataset = make_dataset(8)
    run(make_spec(n_epochs=2, batch_size=8, learning_rate=0.3), dataset, validation=dataset, observer=recorder)
    second, between = recorder.steps[1], recorder.evaluations[0].metrics
    assert second.train_loss == pytest.approx(between["valid_loss"], abs=1e-5)
    assert second.train_loss < recorder.steps[0].train_loss - 1e-3
    assert second.train_mean_token_accuracy == pytest.approx(between["valid_mean_token_accuracy"])


def test_checkpoints_without_validation_have_training_metrics_only(run: Run) -> None:
    recorder = Recorder()
    result = run(make_spec(n_epochs=2), make_dataset(8), observer=recorder)
    assert [set(evaluation.metrics) for evaluation in recorder.evaluations] == [
        {"step", "train_loss", "train_mean_token_accuracy", "hits"}
    ] * 2
    assert result.artifact == recorder.evaluations[-1].artifact


@pytest.mark.parametrize("n_epochs", range(1, 51))
def test_evaluations_are_few_and_end_with_the_run(n_epochs: int) -> None:
    epochs = evaluation_epochs(n_epochs)
    assert max(epochs) == n_epochs
    assert min(epochs) >= 1
    assert len(epochs) <= 10
    assert len(epochs) == n_epochs or n_epochs > 10


@pytest.mark.parametrize("max_tokens_at_once", [1, 64, 10_000])
def test_pieces_of_a_batch_add_up(run: Run, monkeypatch: pytest.MonkeyPatch, max_tokens_at_once: int) -> None:
    """However a batch is cut, one optimizer step and one reinitialisation follow, with the same result."""
    calls = []

    def counted(model: Any, *, step: int) -> int:
        calls.append(step)
        return reinitialise(model, step=step)

    monkeypatch.setattr(callbacks, "reinitialise", counted)
    reference = run(make_spec(batch_size=6), make_dataset(12), validation=make_dataset(5))
    calls.clear()
    monkeypatch.setitem(batches.MAX_TOKENS_AT_ONCE, "cpu", max_tokens_at_once)
    recorder = Recorder()

    result = run(make_spec(batch_size=6), make_dataset(12), validation=make_dataset(5), observer=recorder)

    assert calls == [step.step for step in recorder.steps] == [1, 2, 3, 4]
    assert result.trained_tokens == reference.trained_tokens
    assert result.metrics == pytest.approx(reference.metrics, abs=1e-4)
    found, expected = loads(result.artifact).tensors, loads(reference.artifact).tensors
    np.testing.assert_allclose(found["b"], expected["b"], atol=2e-3)


def test_recomputed_activations_give_the_same_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward
    calls = []

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    reference = run(make_spec(), make_dataset(8))
    kept_calls = len(calls)
    calls.clear()
    monkeypatch.setattr(trainer, "MAX_KEPT_ROW_TOKENS", 1)
    result = run(make_spec(), make_dataset(8))

    assert len(calls) == kept_calls + 2 * result.steps  # the model has two layers
    np.testing.assert_allclose(loads(result.artifact).tensors["b"], loads(reference.artifact).tensors["b"], atol=2e-3)


def test_model_without_masked_logits_is_trained_by_the_plain_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(make_spec(), make_dataset(8), validation=make_dataset(4))
    monkeypatch.setattr(passes, "keeps_masked_logits", lambda _: False)
    result = run(make_spec(), make_dataset(8), validation=make_dataset(4))
    assert result.metrics == pytest.approx(reference.metrics, abs=1e-4)


def test_hits_are_counted(run: Run) -> None:
    """d starts at 0.1, so with tau just above, every index of every layer is hit after the first step."""
    recorder = Recorder()
    result = run(make_spec(tau=10.0, r=4, n_epochs=1), make_dataset(8), observer=recorder)
    layers = len(loads(result.artifact).manifest.modules)
    assert [step.hits for step in recorder.steps] == [layers * 4, 2 * layers * 4]
    assert result.hits == 2 * layers * 4
    assert loads(result.artifact).tensors["hits"].tolist() == [2 * layers] * 4


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_stop_ends_the_run_at_once(run: Run, stop_after: int) -> None:
    recorder = Recorder(stop_after=stop_after)
    with pytest.raises(TrainingStopped):
        run(make_spec(), make_dataset(40), observer=recorder)
    assert len(recorder.steps) == stop_after


def test_stop_is_heard_during_an_evaluation(run: Run) -> None:
    recorder = Recorder(stop_after=2)  # before the run and after its only step
    with pytest.raises(TrainingStopped):
        run(make_spec(n_epochs=1, batch_size=8), make_dataset(8), validation=make_dataset(4), observer=recorder)
    assert (len(recorder.steps), len(recorder.evaluations)) == (1, 0)


@pytest.mark.parametrize(("learning_rate", "step"), [(1e30, "step [12]"), (float("inf"), "step 1")])
def test_divergence_names_its_step(run: Run, learning_rate: float, step: str) -> None:
    spec = make_spec().model_copy(update={"learning_rate": learning_rate})
    with pytest.raises(UoraError, match=rf"at {step}: .*Lower the learning rate") as caught:
        run(spec, make_dataset(16))
    assert caught.value.code == "training_diverged"


def test_loss_that_is_no_number_stops_before_the_optimizer() -> None:
    loss = LearnedTokenLoss()
    watch = DivergenceCallback(loss, LatestGradient())
    event: Any = (None, TrainerState(global_step=4), TrainerControl())
    watch.on_pre_optimizer_step(*event)
    watch.on_evaluate(*event)
    loss.training.loss_sum = loss.validation.loss_sum = float("nan")
    with pytest.raises(UoraError, match=r"training loss .* step 5"):
        watch.on_pre_optimizer_step(*event)
    with pytest.raises(UoraError, match=r"validation loss .* step 4"):
        watch.on_evaluate(*event)


def test_row_longer_than_the_context_is_refused(run: Run) -> None:
    long = ChatRow((ChatMessage("user", "x" * 2000), ChatMessage("assistant", "y", trained=True)), line=3)
    with pytest.raises(DataError, match=r"Line 3: .*1024") as caught:
        run(make_spec(), Dataset((long,), "0" * 64))
    assert caught.value.code == "example_too_long"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q,v", {"q_proj", "v_proj"}),
        (("k_proj",), {"k_proj"}),
    ],
)
def test_targets(run: Run, targets: Any, expected: set[str]) -> None:
    manifest = loads(run(make_spec(targets=targets, n_epochs=1), make_dataset(4)).artifact).manifest
    assert {module.name.rpartition(".")[2] for module in manifest.modules} == expected
    assert manifest.adapter.targets == targets


def test_targets_that_match_nothing_are_refused(run: Run) -> None:
    with pytest.raises(TargetError, match="nowhere") as caught:
        run(make_spec(targets=("nowhere",)), make_dataset(4))
    assert caught.value.param == "targets"


def test_bfloat16_base_keeps_the_vectors_in_float32(run: Run) -> None:
    """A step of 1e-4 on d = 0.1 would be lost in bfloat16, whose neighbours there are 5e-4 apart."""
    result = run(make_spec(learning_rate=1e-4, n_epochs=1), make_dataset(8), dtype=torch.bfloat16)
    d = loads(result.artifact).tensors["d"]
    assert d.dtype == np.float32
    changed = d[d != np.float32(0.1)]
    assert changed.size > 0
    assert (changed != torch.from_numpy(changed).bfloat16().float().numpy()).any()


def test_a_run_leaves_no_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run(make_spec(n_epochs=1), make_dataset(4))
    assert list(tmp_path.iterdir()) == []


def test_progress_values_are_plain_numbers(run: Run) -> None:
    """They go into JSON columns."""
    recorder = Recorder()
    run(make_spec(n_epochs=1), make_dataset(4), validation=make_dataset(4), observer=recorder)
    values = [*dataclasses.asdict(recorder.steps[0]).values(), *recorder.evaluations[0].metrics.values()]
    assert {type(value) for value in values} == {int, float}


def test_clock_estimates_steps_and_evaluations() -> None:
    times = iter([0.0, 2.0, 10.0, 14.0, 20.0, 21.0])
    clock = RunClock(evaluations=3, now=lambda: next(times))
    for _ in range(2):
        clock.step_begins()
        clock.step_ends()
    assert clock.per_second(60) == pytest.approx(10.0)
    assert clock.seconds_left(5) == pytest.approx(15.0)
    clock.evaluation_begins()
    clock.evaluation_ends()
    assert clock.seconds_left(5) == pytest.approx(17.0)
