"""What each training option does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.tiny import make_tiny_bert, make_tiny_llama
from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, Recorder, Trained, spec_of
from tests.uora.task_cases import run as run_case
from tests.uora.training.conftest import Run, make_dataset, make_spec
from uora.artifact import loads
from uora.data import CompletionRow, Dataset, Row
from uora.errors import DataError, OutOfMemory, SpecError, UoraError
from uora.spec import TrainingOptions
from uora.training import TrainingResult
from uora.training.loss import LearnedTokenLoss
from uora.training.tasks import training_task
from uora.training.trainer import HEAD_LEARNING_RATE


def tensors(result: TrainingResult) -> dict[str, Any]:
    """The adapter's numbers."""
    return dict(loads(result.artifact).tensors)


def test_accumulated_batches_are_one_batch_over_their_tokens(run: Run) -> None:
    """Rows have 1 to 4 learned tokens, so means of batches would not add up to the mean over all."""
    whole, pieces = Recorder(), Recorder()
    data = make_dataset(12)
    expected = run(make_spec(batch_size=12, n_epochs=3), data, observer=whole)
    result = run(make_spec(batch_size=1, gradient_accumulation_steps=12, n_epochs=3), data, observer=pieces)
    assert [step.train_loss for step in pieces.steps] == pytest.approx([step.train_loss for step in whole.steps])
    assert [s.gradient_norm for s in pieces.steps] == pytest.approx([s.gradient_norm for s in whole.steps], rel=1e-4)
    assert result.steps == expected.steps == 3
    assert result.trained_tokens == expected.trained_tokens
    np.testing.assert_allclose(tensors(result)["b"], tensors(expected)["b"], atol=2e-3)


def test_the_remainder_of_an_epoch_is_a_step(run: Run) -> None:
    recorder = Recorder()
    spec = make_spec(batch_size=2, gradient_accumulation_steps=3, n_epochs=2)
    result = run(spec, make_dataset(10), observer=recorder)  # 5 batches an epoch
    assert recorder.total_steps == [result.steps] == [4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "constant"}, [1.0] * 4),
        ({"lr_scheduler_type": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4)]),
        ({"warmup_ratio": 0.5}, [0.0, 0.5, 1.0, 0.5]),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, [0.0, 0.5, 1.0, 1.0]),
    ],
)
def test_learning_rate(run: Run, options: dict[str, Any], expected: list[float]) -> None:
    recorder = Recorder()
    run(make_spec(n_epochs=4, batch_size=8, learning_rate=0.01, **options), make_dataset(8), observer=recorder)
    assert [step.learning_rate for step in recorder.steps] == pytest.approx([0.01 * share for share in expected])


def test_gradients_are_cut_and_their_norm_is_reported_uncut(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        seen.append(float(torch.cat(gradients).norm()))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    reported = []
    for norm in (0.0, 1e-3, 1.0):
        recorder = Recorder()
        run(make_spec(n_epochs=1, batch_size=8, max_grad_norm=norm), make_dataset(8), observer=recorder)
        reported.append(recorder.steps[0].gradient_norm)
    assert reported == pytest.approx([reported[0]] * 3)
    assert seen == pytest.approx([reported[0], 1e-3, min(1.0, reported[0])], rel=1e-3)
    assert reported[0] > 1e-2


def test_weight_decay_takes_its_share_of_vectors_and_head(base_of: BaseOf) -> None:
    """AdamW's decay: before the step, everything but a head's bias is ``1 - rate * decay`` of what it was."""
    spec = spec_of("classification", "uora", n_epochs=1, batch_size=18)
    base, case = base_of(make_tiny_bert), CASES["classification"]

    def numbers(decay: float) -> dict[str, Any]:
        options = TrainingOptions(weight_decay=decay, head_learning_rate=0.5)
        changes = {"options": options, "learning_rate": 0.5}
        return tensors(run_case(spec.model_copy(update=changes), base, case).result)

    plain, decayed = numbers(0.0), numbers(0.1)
    np.testing.assert_allclose(decayed["d"], plain["d"] - 0.05 * 0.1, rtol=1e-5)  # d starts at 0.1
    changed = {name: not np.array_equal(plain[name], decayed[name]) for name in plain if name.startswith("head.")}
    assert changed == {name: name.endswith("weight") for name in changed}


def test_weight_decay_leaves_the_initial_pair_of_olora(run: Run) -> None:
    """What OLoRA takes off the base model's weights stays what it was."""

    def initial(decay: float) -> Any:
        spec = make_spec(method="olora", r=2, targets=("q_proj",), weight_decay=decay, n_epochs=1)
        artifact = loads(run(spec, make_dataset(8)).artifact)
        return [(part["lora_a"][2:], part["lora_b"][:, 2:]) for _, part in artifact.parts()]

    for plain, decayed in zip(initial(0.0), initial(0.5), strict=True):
        np.testing.assert_array_equal(plain[0], decayed[0])
        np.testing.assert_array_equal(plain[1], decayed[1])


def test_a_heads_learning_rate(base_of: BaseOf) -> None:
    """Adam's first step is about the learning rate for every number, whatever the gradient."""
    spec = spec_of("classification", "uora", n_epochs=1, batch_size=18)
    base, case = base_of(make_tiny_bert), CASES["classification"]

    def bias(rate: float | None, multiplier: float = 1.0) -> Any:
        options = TrainingOptions(head_learning_rate=rate)
        hyperparameters = spec.hyperparameters.model_copy(update={"learning_rate_multiplier": multiplier})
        changed = spec.model_copy(update={"options": options, "hyperparameters": hyperparameters})
        done = run_case(changed, base, case)
        return tensors(done.result)["head.classifier.bias"]

    np.testing.assert_allclose(np.abs(bias(0.25)), 0.25, rtol=1e-3)
    np.testing.assert_allclose(np.abs(bias(None)), HEAD_LEARNING_RATE, rtol=1e-2)
    np.testing.assert_allclose(np.abs(bias(None, 5.0)), 5.0 * HEAD_LEARNING_RATE, rtol=1e-2)


@pytest.mark.parametrize("wanted", [True, False, "auto"])
def test_gradient_checkpointing(run: Run, monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    forward, calls = LlamaMLP.forward, []

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    run(make_spec(n_epochs=1, batch_size=8, gradient_checkpointing=wanted), make_dataset(8))
    with_gradients = sum(calls)
    assert with_gradients == (4 if wanted is True else 2)  # two layers, once or twice


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (3, [3, 6]), (100, [6])])
def test_evaluations_every_few_steps(run: Run, every: int, steps: list[int]) -> None:
    recorder = Recorder()
    spec = make_spec(n_epochs=3, batch_size=4, eval_steps=every)
    run(spec, make_dataset(8), validation=make_dataset(3), observer=recorder)
    assert [evaluation.step for evaluation in recorder.evaluations] == steps


def test_without_a_word_about_it_no_run_stops_early(run: Run) -> None:
    result = run(make_spec(n_epochs=5, learning_rate=1e-6), make_dataset(8), validation=make_dataset(4))
    assert (result.steps, result.stopped_early) == (10, False)
    assert result.best_step is not None
    assert run(make_spec(n_epochs=1), make_dataset(8)).best_step is None


@pytest.mark.parametrize("option", [{"load_best_model_at_end": True}, {"early_stopping_patience": 1}])
def test_options_that_compare_need_a_validation_set(run: Run, option: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="validation") as caught:
        run(make_spec(**option), make_dataset(8))
    assert caught.value.param == next(iter(option))


def test_divergence_leaves_the_last_good_state(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the fourth step is no number."""
    loss_sum, calls = LearnedTokenLoss._loss_sum, []

    def broken(self: LearnedTokenLoss, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return loss_sum(self, predictions, targets) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(LearnedTokenLoss, "_loss_sum", broken)
    recorder = Recorder()
    with pytest.raises(UoraError, match="at step 4") as caught:
        run(make_spec(n_epochs=1, batch_size=2), make_dataset(12), observer=recorder)
    assert caught.value.code == "training_diverged"
    assert list(recorder.states) == [3]

    expected = run(make_spec(n_epochs=1, batch_size=2), make_dataset(12))
    assert run(make_spec(n_epochs=1, batch_size=2), make_dataset(12), resume=recorder.states[3]) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    forward, calls = LlamaMLP.forward, []

    def full(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            calls.append(None)
        if len(calls) > 4:  # two layers: in the third step
            raise error
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", full)
    recorder = Recorder()
    words = r"a batch of 4 rows with \d+ tokens.*peak it had \d+\.\d GiB\. Lower batch_size, max_length or r"
    with pytest.raises(OutOfMemory, match=words) as caught:
        run(make_spec(n_epochs=1), make_dataset(16), observer=recorder)
    assert caught.value.code == "out_of_memory"
    assert caught.value.__cause__ is error
    assert list(recorder.states) == [2]


def test_other_errors_stay_what_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(LlamaMLP, "forward", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        run(make_spec(n_epochs=1), make_dataset(8))


def test_long_rows_are_cut_or_left_out(base_of: BaseOf) -> None:
    base = base_of(make_tiny_llama)
    rows = tuple(CompletionRow("in the " * (3 + i % 3), "no, not so", i + 1) for i in range(6))
    dataset: Dataset[Row] = Dataset(rows, "d" * 64)
    whole = training_task("completion", base, dataset).examples(dataset)
    shortest, middle, longest = sorted({len(example.input_ids) for example in whole})
    assert shortest > 8

    def examples(max_length: int, overlong: Any) -> list[Any]:
        options = TrainingOptions(max_length=max_length, overlong=overlong)
        return training_task("completion", base, dataset, options=options).examples(dataset)

    for cut, example in zip(examples(middle, "truncate"), whole, strict=True):
        assert (cut.input_ids, cut.labels) == (example.input_ids[:middle], example.labels[:middle])
    assert examples(middle, "drop") == [example for example in whole if len(example.input_ids) < longest]
    for overlong in ("drop", "truncate"):  # 8 tokens are all prompt: nothing would be learned
        with pytest.raises(DataError, match="none is left"):
            examples(8, overlong)
    with pytest.raises(DataError, match=f"Line 3: .*{longest}") as caught:
        examples(middle, "error")
    assert caught.value.code == "example_too_long"


class TestWarmStart:
    """Runs that start from an adapter."""

    @pytest.mark.parametrize("method", ["uora", "vera", "lora", "olora", "osora"])
    def test_goes_on_from_the_adapter(self, run: Run, method: str) -> None:
        """What is evaluated after a step that changes nothing is the adapter that was given."""
        data, changes = make_dataset(8), {"method": method, "r": 4, "learning_rate": 0.1}
        if method == "uora":
            changes |= {"tau_quantile": 0.3, "reinit_interval": 1}
        first = run(make_spec(**changes, n_epochs=3), data, validation=data)
        still = changes | {"learning_rate": 1e-12, "dropout": 0.1}
        if method == "uora":
            still |= {"tau": 0.0, "tau_quantile": None, "reinit_interval": None}
        second = run(make_spec(**still, n_epochs=1), data, validation=data, warm_start=loads(first.artifact))
        assert second.metrics["valid_loss"] == pytest.approx(first.metrics["valid_loss"], abs=1e-6)
        for name, tensor in tensors(first).items():
            np.testing.assert_allclose(tensors(second)[name], tensor, atol=1e-6)

    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_heads_too(self, base_of: BaseOf, trained: Any, task: str) -> None:
        """A regression's head is stored in the labels' units and learns in others."""
        done: Trained = trained(task, "uora")
        recorder = Recorder()
        result = restart(done, observer=recorder)
        assert result.metrics["valid_loss"] == pytest.approx(done.result.metrics["valid_loss"], rel=1e-4)
        name = "head.classifier.weight"
        np.testing.assert_allclose(tensors(result)[name], tensors(done.result)[name], rtol=1e-4)

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"r": 4}, "r"),
            ({"alpha": 0.6}, "alpha"),
            ({"frame_seed": 2}, "frame_seed"),
            ({"targets": "q,v"}, "modules"),
        ],
    )
    def test_other_adapters_are_refused(self, run: Run, changes: dict[str, Any], param: str) -> None:
        first = loads(run(make_spec(n_epochs=1), make_dataset(4)).artifact)
        with pytest.raises(SpecError, match=f"has {param} .*, expected") as caught:
            run(make_spec(n_epochs=1, **changes), make_dataset(4), warm_start=first)
        assert caught.value.param == param

    def test_of_another_base_model_is_refused(self, run: Run) -> None:
        first = loads(run(make_spec(n_epochs=1), make_dataset(4)).artifact)
        manifest = first.manifest.model_copy(update={"base_digest": "0" * 64})
        with pytest.raises(SpecError, match="base_digest"):
            run(make_spec(n_epochs=1), make_dataset(4), warm_start=type(first)(manifest, first.tensors))


def restart(done: Trained, *, observer: Recorder) -> TrainingResult:
    """A run from a finished one's adapter, at rates that leave it what it is."""
    from uora.training import train

    options = TrainingOptions(head_learning_rate=1e-12)
    hyperparameters = done.spec.hyperparameters.model_copy(update={"n_epochs": 1})
    changes = {"learning_rate": 1e-12, "options": options, "hyperparameters": hyperparameters}
    data = Dataset(done.case.rows, "d" * 64)
    return train(
        done.spec.model_copy(update=changes),
        base=done.base,
        training=data,
        validation=data,
        observer=observer,
        cache_dir=None,
        dtype=torch.float32,
        warm_start=done.artifact,
    )
