"""Several runs on one base model with one forward and backward pass for all.

Each run is trained by the very code that trains it alone, with its own order of rows, optimizer, schedule, evaluations,
states and stop. Only its forward and backward passes are made here: the runs are strands (``uora.training.strands``)
that wait when they have a batch; when all wait, the batches go through the lead of their models as one packed sequence,
and every run goes on with the gradients of its own vectors. A run that ends, or fails, leaves the others to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from uora.artifact import Artifact
from uora.data import Dataset, Example, Row
from uora.errors import SpecError
from uora.models import Batch, LocalModel, load_model
from uora.spec import TrainingSpec, cotraining_key
from uora.training.batches import MAX_TOKENS_AT_ONCE, unpadded
from uora.training.loop import device
from uora.training.loss import TaskLoss, predicting_positions
from uora.training.memory import LatestBatch
from uora.training.observer import TrainingObserver, TrainingResult
from uora.training.packing import Packed, Packer, pack
from uora.training.passes import CausalPasses
from uora.training.strands import Asked, Ended, Strand
from uora.training.tasks import TrainingTask
from uora.training.trainer import Loaded, Run, prepare, train_run
from uora.tuner.joining import JointModel, copy_structure


@dataclass(frozen=True)
class Member:
    """One run of several; its fields are those arguments of ``uora.training.train``."""

    spec: TrainingSpec
    training: Dataset[Row]
    validation: Dataset[Row] | None
    observer: TrainingObserver
    resume: bytes | None = None
    warm_start: Artifact | None = None


#: Told the number of a run that has ended, and what it came to.
EndCallback = Callable[[int, TrainingResult | Exception], None]


def cotrain(
    members: Sequence[Member],
    *,
    base: LocalModel,
    cache_dir: Path | None,
    dtype: torch.dtype,
    ended: EndCallback | None = None,
) -> list[TrainingResult | Exception]:
    """Train several runs together; each comes to what `train` comes to, but for rounding.

    Args:
        members: the runs.
        base: the model that all of them tune.
        cache_dir: as in `train`.
        dtype: as in `train`.
        ended: called as soon as a run has ended, while the others go on.

    Returns:
        For each run its result, or what `train` would have raised. One run's error is none of the others'.

    Raises:
        SpecError: their adapters have not the same shapes, or the base model cannot be packed (code
            ``cannot_cotrain``); nothing was trained.
        BaseModelError: the base model cannot be loaded.
    """
    _check(members)
    model = load_model(base, dtype=dtype, device=device(), copies_in=cache_dir)
    passes = CausalPasses.of(model, packing=True)
    if passes.packer is None or not passes.masked:
        raise SpecError(f"{base.name} cannot take packed rows; train the runs one by one.", code="cannot_cotrain")
    results: dict[int, TrainingResult | Exception] = {}

    def end(number: int, outcome: TrainingResult | Exception) -> None:
        results[number] = outcome
        if ended is not None:
            ended(number, outcome)

    runs: dict[int, Run] = {}
    for number, member in enumerate(members):
        try:
            runs[number] = _prepare(member, Loaded(copy_structure(model), passes.pieces), base, cache_dir)
        except Exception as error:  # another member's rows may be right
            end(number, error)
    if runs:
        _train(runs, [member.observer for member in members], passes.packer, end)
    return [results[number] for number in range(len(members))]


def _check(members: Sequence[Member]) -> None:
    keys = {cotraining_key(member.spec) for member in members}
    if len(keys) != 1 or None in keys:
        raise SpecError(
            "Runs that are trained together need the same method, rank, targets and frames, rows that are packed, and "
            "no dropout. Train them one by one.",
            code="cannot_cotrain",
        )


def _prepare(member: Member, loaded: Loaded, base: LocalModel, cache_dir: Path | None) -> Run:
    def load(_task: TrainingTask) -> Loaded:
        return loaded

    return prepare(
        member.spec,
        base=base,
        load=load,
        training=member.training,
        validation=member.validation,
        cache_dir=cache_dir,
        resume=member.resume,
        warm_start=member.warm_start,
    )


@dataclass(frozen=True)
class _Batch:
    """What a run waits with: rows, and the predictions in all batches of its optimizer step."""

    examples: list[Example]
    loss: TaskLoss[Any]
    count: Tensor | int | None


_Strand = Strand[_Batch, Tensor, TrainingResult]


def _train(runs: Mapping[int, Run], observers: Sequence[TrainingObserver], packer: Packer, ended: EndCallback) -> None:
    strands = {number: _strand(run, observers[number]) for number, run in runs.items()}
    passes = _JointPasses(JointModel({number: run.model for number, run in runs.items()}), packer)
    said = {number: strand.begin() for number, strand in strands.items()}
    while said:
        for number, each in said.items():
            if isinstance(each, Ended):
                ended(number, each.outcome)
        waiting = {number: each.question for number, each in said.items() if isinstance(each, Asked)}
        answers = passes.make(waiting)
        said = {number: strands[number].resume(answers[number]) for number in waiting}


def _strand(run: Run, observer: TrainingObserver) -> _Strand:
    def train(ask: Any) -> TrainingResult:
        def elsewhere(batch: Batch, count: Tensor | int | None) -> Tensor:
            loss: Tensor = ask(_Batch(unpadded(batch), run.task.loss, count))
            return loss

        return train_run(run, observer, LatestBatch(), elsewhere=elsewhere)

    return Strand(train)


class _JointPasses:
    """Forward and backward passes over the batches of several runs."""

    def __init__(self, models: JointModel, packer: Packer) -> None:
        self._models = models
        self._packer = packer
        self._max_tokens = MAX_TOKENS_AT_ONCE[models.lead.device.type]

    def make(self, batches: Mapping[int, _Batch]) -> dict[int, Tensor | Exception]:
        """Add up the gradients of every run's vectors; gives each its loss, or the error of its pass."""
        answers: dict[int, Tensor | Exception] = {}
        for parts in self._passes(batches):
            try:
                losses = self._pass(parts, batches)
            except Exception as error:  # all of this pass lost their gradients, and the others have theirs
                answers |= dict.fromkeys(parts, error)
                continue
            for number, loss in losses.items():
                earlier = answers.get(number, torch.zeros_like(loss))
                answers[number] = earlier if isinstance(earlier, Exception) else earlier + loss
        return answers

    def _passes(self, batches: Mapping[int, _Batch]) -> Iterator[dict[int, Sequence[Example]]]:
        """Rows by run for each pass, of bounded size; a run has one part in a pass at most."""
        together: dict[int, Sequence[Example]] = {}
        tokens = 0
        for number, batch in batches.items():
            for part in self._packer.parts(batch.examples, max_tokens=self._max_tokens):
                more = self._packer.tokens(part)
                if together and (number in together or tokens + more > self._max_tokens):
                    yield together
                    together, tokens = {}, 0
                together[number] = part
                tokens += more
        if together:
            yield together

    def _pass(self, parts: Mapping[int, Sequence[Example]], batches: Mapping[int, _Batch]) -> dict[int, Tensor]:
        piece = pack(list(parts.values()), share_prefix=self._packer.share_prefix)
        packed: Packed = piece["packed"]
        on = self._models.lead.device
        inputs = {name: piece[name].to(on) for name in ("input_ids", "position_ids")}
        labels: Tensor = piece["labels"].to(on)
        tokens = {number: group.tokens for number, group in zip(parts, packed.groups, strict=True)}
        with self._models.forward_of(tokens) as lead:
            logits = lead(
                **inputs, packed=packed, logits_to_keep=predicting_positions(labels), use_cache=False
            ).logits.reshape(-1, lead.config.get_text_config().vocab_size)
        own_labels = [labels[:, place] for _, place in packed.slices()]
        # Split, not sliced: autograd would make zeros of the size of all logits for every slice.
        own_logits = logits.split([int(predicting_positions(own).sum()) for own in own_labels])
        losses = {
            number: batches[number].loss(SimpleNamespace(logits=own), labels, batches[number].count)
            for number, own, labels in zip(parts, own_logits, own_labels, strict=True)
        }
        torch.autograd.backward(list(losses.values()))
        return {number: loss.detach() for number, loss in losses.items()}
