"""Runs that share their passes come to what each comes to alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.uora.task_cases import Recorder
from tests.uora.training.conftest import Run, make_dataset, make_spec
from uora.artifact import loads
from uora.data import ChatMessage, ChatRow, Dataset, Row
from uora.errors import DataError, SpecError, UoraError
from uora.models import LocalModel
from uora.spec import TrainingOptions, TrainingSpec, cotraining_key
from uora.training import TrainingResult, TrainingStopped, batches
from uora.training.cotraining import Member, cotrain


def make_member(spec: TrainingSpec, rows: int, *, first: int = 0, validation: int = 0, **changes: Any) -> Member:
    whole = make_dataset(first + rows)
    dataset: Dataset[Row] = Dataset(whole.rows[first:], f"{first:064d}")
    valid = make_dataset(validation) if validation else None
    return Member(spec, dataset, valid, changes.pop("observer", Recorder()), **changes)


def with_options(spec: TrainingSpec, **options: Any) -> TrainingSpec:
    return spec.model_copy(update={"options": TrainingOptions(**options)})


def together(members: Sequence[Member], base: LocalModel) -> list[Any]:
    return cotrain(members, base=base, cache_dir=None, dtype=torch.float32)


def alone(member: Member, run: Run) -> tuple[TrainingResult, Recorder]:
    recorder = Recorder()
    return run(member.spec, member.training, validation=member.validation, observer=recorder), recorder


def assert_same_adapter(found: bytes, expected: bytes) -> None:
    one, other = loads(found), loads(expected)
    for name, tensor in other.tensors.items():
        np.testing.assert_allclose(one.tensors[name], tensor, atol=2e-4, err_msg=name)
    assert one.manifest.metrics == pytest.approx(other.manifest.metrics, abs=1e-4)


def test_each_run_comes_to_what_it_comes_to_alone(run: Run, tiny_base: LocalModel) -> None:
    """Runs of other lengths, batches, rates, schedules, accumulation and evaluations, some of which end early."""
    members = [
        make_member(make_spec(n_epochs=2, batch_size=1), 5),
        make_member(make_spec(n_epochs=3, batch_size=4, learning_rate=0.2, seed=5), 9, first=3, validation=4),
        make_member(
            with_options(
                make_spec(n_epochs=2, batch_size=2), gradient_accumulation_steps=2, lr_scheduler_type="cosine"
            ),
            7,
            first=1,
        ),
        make_member(
            with_options(make_spec(n_epochs=4, batch_size=3), eval_steps=2, max_grad_norm=0.01), 6, validation=3
        ),
        make_member(
            with_options(make_spec(n_epochs=20, batch_size=4, learning_rate=1e-9), early_stopping_patience=1),
            4,
            validation=2,
        ),
    ]
    results = together(members, tiny_base)
    for member, result in zip(members, results, strict=True):
        expected, recorder = alone(member, run)
        found: Any = member.observer
        assert_same_adapter(result.artifact, expected.artifact)
        assert (result.steps, result.trained_tokens, result.stopped_early, result.best_step) == (
            expected.steps,
            expected.trained_tokens,
            expected.stopped_early,
            expected.best_step,
        )
        assert [step.train_loss for step in found.steps] == pytest.approx(
            [step.train_loss for step in recorder.steps], abs=1e-4
        )
        assert [step.gradient_norm for step in found.steps] == pytest.approx(
            [step.gradient_norm for step in recorder.steps], rel=1e-2, abs=1e-6
        )
        assert [step.learning_rate for step in found.steps] == [step.learning_rate for step in recorder.steps]
        assert [e.step for e in found.evaluations] == [e.step for e in recorder.evaluations]


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_runs_whose_frames_were_hit_have_their_own(run: Run, tiny_base: LocalModel, scope: str) -> None:
    """From the first hit on, the frames differ, so that no product with them can be shared."""
    members = [
        make_member(make_spec(tau_quantile=quantile, reinit_interval=2, reinit_scope=scope, learning_rate=0.02), 8)
        for quantile in (0.1, 0.3)
    ] + [make_member(make_spec(reinit_scope=scope, learning_rate=0.02), 8)]
    results = together(members, tiny_base)
    for member, result in zip(members, results, strict=True):
        assert_same_adapter(result.artifact, alone(member, run)[0].artifact)
    assert [result.hits > 0 for result in results] == [True, True, False]


def test_osora_runs_share_their_passes(run: Run, tiny_base: LocalModel) -> None:
    from tests.uora.task_cases import spec_of

    members = [make_member(spec_of("chat", "osora", n_epochs=epochs, batch_size=4), 8) for epochs in (1, 2)]
    for member, result in zip(members, together(members, tiny_base), strict=True):
        assert_same_adapter(result.artifact, alone(member, run)[0].artifact)


def test_batches_of_all_runs_are_one_pass(tiny_base: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, passes = LlamaForCausalLM.forward, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["packed"]) if torch.is_grad_enabled() else None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    together([make_member(make_spec(n_epochs=epochs, batch_size=4), 8) for epochs in (1, 2, 3)], tiny_base)
    assert [len(packed.groups) for packed in passes] == [3, 3, 2, 2, 1, 1]


@pytest.mark.parametrize("max_tokens", [8, 40, 100])
def test_passes_are_bounded(run: Run, tiny_base: LocalModel, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    members = [make_member(make_spec(n_epochs=2, batch_size=4, seed=seed), 8) for seed in range(3)]
    expected = [alone(member, run)[0].artifact for member in members]
    monkeypatch.setitem(batches.MAX_TOKENS_AT_ONCE, "cpu", max_tokens)
    for result, artifact in zip(together(members, tiny_base), expected, strict=True):
        assert_same_adapter(result.artifact, artifact)


def test_one_run_that_diverges_leaves_the_others_as_they_are(run: Run, tiny_base: LocalModel) -> None:
    broken = make_spec(n_epochs=4).model_copy(update={"learning_rate": 1e30})
    members = [make_member(make_spec(n_epochs=3), 8), make_member(broken, 8), make_member(make_spec(seed=2), 8)]
    first, second, third = together(members, tiny_base)
    assert isinstance(second, UoraError)
    assert second.code == "training_diverged"
    assert_same_adapter(first.artifact, alone(members[0], run)[0].artifact)
    assert_same_adapter(third.artifact, alone(members[2], run)[0].artifact)


def test_an_end_is_told_while_the_others_go_on(tiny_base: LocalModel) -> None:
    long = ChatRow((ChatMessage("user", "x" * 2000), ChatMessage("assistant", "y", trained=True)), line=3)
    bad = Member(make_spec(), Dataset((long,), "0" * 64), None, Recorder())
    slow, quick = make_member(make_spec(n_epochs=4), 8), make_member(make_spec(n_epochs=1), 8)
    ends: list[tuple[int, object, int]] = []

    def ended(number: int, outcome: object) -> None:
        observer: Any = slow.observer
        ends.append((number, outcome, len(observer.steps)))

    results = cotrain([slow, bad, quick], base=tiny_base, cache_dir=None, dtype=torch.float32, ended=ended)
    assert [(number, outcome is results[number]) for number, outcome, _ in ends] == [(1, True), (2, True), (0, True)]
    steps = [of_slow for _, _, of_slow in ends]
    assert steps[0] == 0 < steps[1] < steps[2] == 8


def test_one_run_is_stopped_and_goes_on_later(run: Run, tiny_base: LocalModel) -> None:
    stopped = Recorder(stop_after=3)
    members = [make_member(make_spec(n_epochs=3), 8), make_member(make_spec(n_epochs=3, seed=4), 8, observer=stopped)]
    first, second = together(members, tiny_base)
    assert isinstance(second, TrainingStopped)
    assert_same_adapter(first.artifact, alone(members[0], run)[0].artifact)
    (step, state) = max(stopped.states.items())
    assert 0 < step < 6

    again = make_member(members[1].spec, 8, resume=state)
    other = make_member(make_spec(n_epochs=2, seed=9), 8, first=2)
    result, _ = together([again, other], tiny_base)
    assert_same_adapter(result.artifact, alone(members[1], run)[0].artifact)


def test_one_run_with_bad_rows_leaves_the_others(run: Run, tiny_base: LocalModel) -> None:
    long = ChatRow((ChatMessage("user", "x" * 2000), ChatMessage("assistant", "y", trained=True)), line=3)
    members = [
        make_member(make_spec(), 8),
        Member(make_spec(), Dataset((long,), "0" * 64), None, Recorder()),
    ]
    first, second = together(members, tiny_base)
    assert isinstance(second, DataError)
    assert_same_adapter(first.artifact, alone(members[0], run)[0].artifact)


@pytest.mark.parametrize("changes", [{"r": 4}, {"frame_seed": 1}, {"targets": "q,v"}, {"dropout": 0.1}])
def test_other_shapes_are_refused(tiny_base: LocalModel, changes: dict[str, Any]) -> None:
    members = [make_member(make_spec(), 4), make_member(make_spec(**changes), 4)]
    with pytest.raises(SpecError) as caught:
        together(members, tiny_base)
    assert caught.value.code == "cannot_cotrain"


def test_what_differs_in_a_run_but_not_in_its_shapes_has_the_same_key() -> None:
    spec = make_spec()
    same = [make_spec(tau=0.5, alpha=0.1, reinit_scope="layer"), make_spec(learning_rate=1.0, n_epochs=9, seed=3)]
    assert {cotraining_key(other) for other in same} == {cotraining_key(spec)} != {None}
    assert cotraining_key(spec.model_copy(update={"task": "classification"})) is None
    assert cotraining_key(with_options(spec, packing=False)) is None
