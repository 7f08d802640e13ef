"""Every task with every method: it learns, and what is stored is what was trained."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.tiny import make_tiny_bert, make_tiny_llama, make_tiny_vit
from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, TrainCase, Trained, run, spec_of
from uora.artifact import loads
from uora.data import IGNORED, Dataset, Overlong, TextRow
from uora.errors import DataError
from uora.methods import load_artifact
from uora.models import load_model
from uora.spec import METHODS, MethodName, TrainingOptions
from uora.svd import BaseWeights
from uora.training import batches, trainer
from uora.training.tasks import training_task

every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("method", METHODS)


def make_bert_without_pooler(directory: Path) -> Path:
    return make_tiny_bert(directory, with_pooler=False)


def make_still_bert(directory: Path) -> Path:
    return make_tiny_bert(directory, dropout=0.0)


def loaded(trained: Trained, artifact: bytes, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A stored adapter on its base model, by PEFT."""
    stored = loads(artifact)
    model = load_model(
        trained.base, dtype=dtype, device="cpu", task=trained.case.task, labels=stored.manifest.labels, seed=99
    )
    weights = BaseWeights.of_local(trained.base, trained.case.task, None)
    return load_artifact(model, stored, base=weights).eval()


def by_hand(model: PeftModel, trained: Trained) -> dict[str, float]:
    """Loss and quality over the case's rows, one row at a time, with the model's own loss."""
    task = training_task(trained.case.task, trained.base, trained.case.dataset)
    losses, counts, right, predicted, wanted = [], [], 0, [], []
    for example in task.examples(trained.case.dataset):
        batch = task.collate([example])
        with torch.no_grad():
            outputs = model(**batch)
        labels = batch["labels"]
        if labels.dim() == 2:
            logits, labels = outputs.logits[0, :-1], labels[0, 1:]
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        else:
            logits = outputs.logits
        losses.append(outputs.loss.item() * len(labels))
        counts.append(len(labels))
        right += int((logits.argmax(-1) == labels).sum())
        predicted += logits[:, 0].tolist()
        wanted += labels.tolist()
    loss = sum(losses) / sum(counts)
    match trained.case.task:
        case "chat" | "completion":
            return {"valid_loss": loss, "valid_mean_token_accuracy": right / sum(counts)}
        case "regression":
            return {"valid_loss": loss, "valid_pearson": statistics.correlation(predicted, wanted)}
        case _:
            return {"valid_loss": loss, "valid_accuracy": right / sum(counts)}


@every_method
@every_case
def test_every_task_is_learned_by_every_method(trained: TrainCase, case: str, method: MethodName) -> None:
    done = trained(case, method)
    losses = [step.train_loss for step in done.recorder.steps]
    per_epoch = len(losses) // done.spec.hyperparameters.n_epochs
    assert statistics.mean(losses[-per_epoch:]) < 0.95 * statistics.mean(losses[:per_epoch])

    manifest = done.artifact.manifest
    assert (manifest.task, manifest.adapter) == (done.case.task, done.spec.adapter)
    assert (manifest.chat_template_sha256 is not None) == (case == "chat")
    assert manifest.labels == tuple(
        sorted({row.label for row in done.case.rows if isinstance(getattr(row, "label", 0.0), str)})
    )


@every_method
@every_case
def test_what_is_stored_is_what_was_trained(trained: TrainCase, case: str, method: MethodName) -> None:
    """The metrics of the run, against the stored adapter on a base model whose head starts from another seed."""
    done = trained(case, method)
    evaluation = done.recorder.evaluations[-1]
    expected = by_hand(loaded(done, evaluation.artifact), done)
    found = {name: value for name, value in evaluation.metrics.items() if name.startswith("valid_")}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert {f"full_{name}": value for name, value in found.items()}.items() <= evaluation.metrics.items()


@every_method
@pytest.mark.parametrize("case", ["chat", "classification"])
def test_metrics_are_the_tasks_own(trained: TrainCase, case: str, method: MethodName) -> None:
    done = trained(case, method)
    quality = "mean_token_accuracy" if case == "chat" else "accuracy"
    names = {"step"} | {f"{part}{name}" for part in ("train_", "valid_", "full_valid_") for name in ("loss", quality)}
    assert set(done.result.metrics) == names | ({"hits"} if method == "uora" else set())
    assert {step.train_mean_token_accuracy is None for step in done.recorder.steps} == {case != "chat"}


@pytest.mark.parametrize("case", ["classification", "regression", "decoder", "image-classification"])
def test_the_head_is_stored_and_counted_apart(trained: TrainCase, case: str) -> None:
    manifest = trained(case, "uora").artifact.manifest
    outputs, hidden = len(manifest.labels) or 1, 48 if case == "decoder" else 32
    name = "score" if case == "decoder" else "classifier"
    assert manifest.head == {f"{name}.weight": (outputs, hidden), f"{name}.bias": (outputs,)}
    assert manifest.head_parameters == outputs * hidden + outputs
    assert manifest.trainable_parameters == sum(4 + module.out_features for module in manifest.modules)
    assert not any(name in module.name for module in manifest.modules)


def test_numbers_of_any_size_are_learned(trained: TrainCase) -> None:
    """The model sees numbers around 0; what is reported and stored is in the file's own."""
    done = trained("regression", "uora")
    numbers = [row.label for row in done.case.rows if isinstance(row, TextRow) and isinstance(row.label, float)]
    variance = statistics.pvariance(numbers)
    assert done.recorder.steps[0].train_loss == pytest.approx(variance, rel=0.9)
    assert done.result.metrics["valid_loss"] < 0.8 * variance
    start = load_model(done.base, dtype=torch.float32, device="cpu", task="regression", seed=done.spec.seed)
    assert done.artifact.head()["classifier.bias"] == pytest.approx(statistics.fmean(numbers), abs=5)
    assert start.classifier.bias.item() == 0.0


def test_storing_leaves_the_training_as_it_was(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the adapter is stored on the way, the same one comes out."""
    case, base = CASES["regression"], base_of(make_still_bert)
    often = run(spec_of(case.task, "uora"), base, case)
    monkeypatch.setattr(trainer, "MAX_EVALUATIONS", 1)
    once = run(spec_of(case.task, "uora"), base, case)
    assert (len(often.recorder.evaluations), len(once.recorder.evaluations)) == (5, 1)
    assert once.result.artifact == often.result.artifact


def test_a_missing_pooler_is_part_of_the_head(base_of: BaseOf) -> None:
    case = CASES["classification"]
    done = run(spec_of(case.task, "uora", n_epochs=2), base_of(make_bert_without_pooler), case)
    manifest = done.artifact.manifest
    assert {name.rpartition(".")[0] for name in manifest.head} == {"bert.pooler.dense", "classifier"}
    assert by_hand(loaded(done, done.result.artifact), done)["valid_loss"] == pytest.approx(
        done.result.metrics["valid_loss"], abs=1e-4
    )


@pytest.mark.parametrize("method", ["uora", "lora"])
@pytest.mark.parametrize("case", ["completion", "regression", "image-classification"])
def test_same_seed_same_bits(trained: TrainCase, case: str, method: MethodName) -> None:
    done = trained(case, method)
    assert run(done.spec, done.base, done.case).result.artifact == done.result.artifact
    other = run(done.spec.model_copy(update={"seed": 1}), done.base, done.case).result.artifact
    assert other != done.result.artifact


@pytest.mark.parametrize("case", ["pairs", "regression", "image-classification"])
def test_pieces_of_a_batch_add_up(base_of: BaseOf, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, which draws other numbers for other pieces, however a batch is cut the result is the same."""
    base = base_of(make_tiny_vit if case == "image-classification" else make_still_bert)
    spec = spec_of(CASES[case].task, "uora", n_epochs=1)
    reference = run(spec, base, CASES[case]).result
    monkeypatch.setitem(batches.MAX_TOKENS_AT_ONCE, "cpu", 1)
    monkeypatch.setitem(batches.MAX_IMAGES_AT_ONCE, "cpu", 1)
    result = run(spec, base, CASES[case]).result
    assert result.trained_tokens == reference.trained_tokens
    assert result.metrics == pytest.approx(reference.metrics, rel=1e-5, abs=1e-4)
    found, expected = loads(result.artifact).head(), loads(reference.artifact).head()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-3)


@pytest.mark.parametrize("case", ["classification", "decoder", "image-classification"])
def test_a_bfloat16_base_keeps_its_head_in_float32(trained: TrainCase, case: str) -> None:
    done = trained(case, "uora")
    spec = spec_of(done.case.task, "uora", n_epochs=2)
    half = run(spec, done.base, done.case, dtype=torch.bfloat16)
    head = half.artifact.head()
    assert {values.dtype for values in head.values()} == {np.dtype(np.float32)}
    assert any((values != torch.from_numpy(values).bfloat16().float().numpy()).any() for values in head.values())
    found = by_hand(loaded(half, half.result.artifact, torch.bfloat16), half)["valid_loss"]
    assert found == pytest.approx(half.result.metrics["valid_loss"], abs=2e-2)


def test_the_head_has_a_learning_rate_of_its_own(base_of: BaseOf) -> None:
    """A method's rate is the adapter's only: at one of 0, b stays 0 and the head learns."""
    case = CASES["classification"]
    spec = spec_of(case.task, "uora").model_copy(update={"learning_rate": 0.0})
    done = run(spec, base_of(make_tiny_bert), case)
    assert not done.artifact.tensors["b"].any()
    start = load_model(
        done.base, dtype=torch.float32, device="cpu", task=case.task, labels=("fruit", "tool"), seed=spec.seed
    )
    assert not np.allclose(done.artifact.head()["classifier.weight"], start.classifier.weight.detach(), atol=1e-3)
    assert {step.learning_rate for step in done.recorder.steps} == {0.0}


def test_images_have_no_tokens(trained: TrainCase) -> None:
    done = trained("image-classification", "uora")
    assert {step.trained_tokens for step in done.recorder.steps} == {0}
    assert {step.tokens_per_second for step in done.recorder.steps} == {0.0}


def text_rows(*labels: Any) -> Dataset[Any]:
    return Dataset(tuple(TextRow("some words", None, label, line) for line, label in enumerate(labels, 3)), "d" * 64)


def test_rows_that_cannot_be_learned_name_their_line(base_of: BaseOf) -> None:
    base = base_of(make_tiny_bert)
    with pytest.raises(DataError, match="at least two classes"):
        training_task("classification", base, text_rows("a", "a"))
    task = training_task("classification", base, text_rows("a", "b"))
    with pytest.raises(DataError, match="Line 4: the label 'c'") as caught:
        task.examples(text_rows("a", "c"))
    assert (caught.value.code, caught.value.line) == ("unknown_label", 4)
    long = Dataset((TextRow("word " * 40, None, "a", 7),), "")
    with pytest.raises(DataError, match="Line 7: the row has 162 tokens; at most 64 are taken") as caught:
        task.examples(long)
    assert caught.value.code == "example_too_long"


@pytest.mark.parametrize(("overlong", "lengths"), [("truncate", [12, 6]), ("drop", [6])])
def test_texts_that_are_too_long_are_cut_or_left_out(base_of: BaseOf, overlong: Overlong, lengths: list[int]) -> None:
    rows = Dataset((TextRow("word " * 40, None, "a", 1), TextRow("word", None, "b", 2)), "d" * 64)
    options = TrainingOptions(max_length=12, overlong=overlong)
    task = training_task("classification", base_of(make_tiny_bert), rows, options=options)
    whole, short = task.examples(rows) if overlong == "truncate" else (None, *task.examples(rows))
    assert [task.length(example) for example in (whole, short) if example is not None] == lengths
    if whole is not None:
        assert whole.features["input_ids"][-1] == short.features["input_ids"][-1]  # the closing special token stays


def test_a_damaged_image_names_its_line(trained: TrainCase) -> None:
    case = CASES["image-classification"]
    task = training_task(case.task, trained("image-classification", "uora").base, case.dataset)
    row = case.rows[0]
    broken = Dataset((row, type(row)(row.image[:40], row.label, 8)), "")
    with pytest.raises(DataError, match="Line 8: the image cannot be read") as caught:
        task.examples(broken)
    assert caught.value.code == "invalid_image"


def test_decoders_tell_two_texts_apart(base_of: BaseOf) -> None:
    """A tokenizer that puts nothing between two texts would make "a", "bc" and "ab", "c" the same row."""
    task = training_task("regression", base_of(make_tiny_llama), text_rows(1.0))
    rows = Dataset((TextRow("a", "bc", 0.0, 1), TextRow("ab", "c", 0.0, 2)), "")
    first, second = task.examples(rows)
    assert first.features != second.features
