"""Classifiers in one batch: every row is answered by its own adapter and its own head, as it would be alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import make_tiny_bert
from tests.uora.conftest import BaseOf
from tests.uora.task_cases import CASES, TrainCase, Trained, run, spec_of
from tests.uora.training.test_tasks import make_bert_without_pooler
from uora.data import ImageRow, TextRow
from uora.errors import AdapterNotFoundError, DataError, ShapeError
from uora.methods import load_artifact
from uora.models import LocalModel, ModelInputs, load_image_inputs, load_model, load_text_inputs
from uora.serving.bank import AdapterBank
from uora.serving.classification import Classifier, Item, Prediction
from uora.serving.heads import Heads
from uora.spec import METHODS, Task
from uora.svd import BaseWeights


@dataclass
class Served:
    """A classifier with adapters in its bank."""

    classifier: Classifier
    bank: AdapterBank
    heads: Heads
    runs: list[Trained]

    @property
    def digests(self) -> list[str]:
        return [done.artifact.manifest.digest for done in self.runs]


def inputs_of(base: LocalModel, task: Task) -> ModelInputs:
    return load_image_inputs(base) if task == "image-classification" else load_text_inputs(base)


def serve(runs: list[Trained]) -> Served:
    base, task = runs[0].base, runs[0].case.task
    model = load_model(base, dtype=torch.float32, device="cpu", task=task)
    heads = Heads(model)
    weights = BaseWeights.of_local(base, task, None)
    bank = AdapterBank(model, base_digest=base.digest, weights=weights, heads=heads)
    for done in runs:
        bank.check(done.artifact.manifest)
        bank.put(done.artifact)
    return Served(Classifier(model, inputs_of(base, task), bank, heads), bank, heads, runs)


@pytest.fixture(scope="module")
def texts(trained: TrainCase) -> Served:
    """Two classes, three classes and a number, by every method, on one encoder."""
    return serve([trained(case, method) for case in ("classification", "pairs", "regression") for method in METHODS])


@pytest.fixture(scope="module")
def decoders(trained: TrainCase) -> Served:
    return serve([trained("decoder", method) for method in METHODS])


@pytest.fixture(scope="module")
def images(trained: TrainCase) -> Served:
    return serve([trained("image-classification", method) for method in METHODS])


def item_of(row: object) -> Item:
    match row:
        case ImageRow(image=image):
            return image
        case TextRow(text=text, text_pair=None):
            return text
        case TextRow(text=text, text_pair=str(pair)):
            return text, pair
    raise TypeError(row)


def same(found: Prediction, expected: Prediction) -> bool:
    return found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def by_peft(done: Trained, item: Item) -> Prediction:
    """What the stored adapter says of one item on a model of its own."""
    manifest = done.artifact.manifest
    model = load_model(done.base, dtype=torch.float32, device="cpu", task=manifest.task, labels=manifest.labels)
    weights = BaseWeights.of_local(done.base, manifest.task, None)
    peft_model = load_artifact(model, done.artifact, base=weights).eval()
    with torch.no_grad():
        logits = peft_model(**inputs_of(done.base, manifest.task).batch([item])).logits[0]
    if manifest.task == "regression":
        return float(logits[0])
    return dict(zip(manifest.labels, logits.softmax(0).tolist(), strict=True))


@pytest.mark.parametrize("kind", ["texts", "decoders", "images"])
def test_mixed_batch_answers_as_each_trained_model(request: pytest.FixtureRequest, kind: str) -> None:
    served: Served = request.getfixturevalue(kind)
    items = [item_of(done.case.rows[index % 7]) for index, done in enumerate(served.runs)]
    mixed = served.classifier.predict(items, served.digests)
    for done, item, digest, found in zip(served.runs, items, served.digests, mixed, strict=True):
        assert same(found, served.classifier.predict([item], [digest])[0])
        assert same(found, by_peft(done, item))


# Derandomised: rounding differs with the batch.
@settings(deadline=None, max_examples=25, derandomize=True)
@given(rows=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 17)), min_size=1, max_size=8))
def test_any_mix_is_row_by_row(texts: Served, rows: list[tuple[int, int]]) -> None:
    items = [item_of(texts.runs[adapter].case.rows[row]) for adapter, row in rows]
    digests = [texts.digests[adapter] for adapter, _ in rows]
    mixed = texts.classifier.predict(items, digests)
    alone = [texts.classifier.predict([item], [digest])[0] for item, digest in zip(items, digests, strict=True)]
    assert all(map(same, mixed, alone))


def test_probabilities_are_those_of_the_adapters_own_classes(texts: Served) -> None:
    items = [item_of(done.case.rows[0]) for done in texts.runs]
    for done, found in zip(texts.runs, texts.classifier.predict(items, texts.digests), strict=True):
        if done.case.task == "regression":
            assert isinstance(found, float)
        else:
            assert isinstance(found, dict)
            assert tuple(found) == done.artifact.manifest.labels
            assert sum(found.values()) == pytest.approx(1.0)


def test_a_pooler_of_its_own_is_served_too(base_of: BaseOf) -> None:
    base = base_of(make_bert_without_pooler)
    cases = [CASES["classification"], CASES["pairs"]]
    served = serve([run(spec_of(case.task, "uora", n_epochs=2), base, case) for case in cases])
    items = [item_of(case.rows[1]) for case in cases]
    for done, item, found in zip(served.runs, items, served.classifier.predict(items, served.digests), strict=True):
        assert same(found, by_peft(done, item))


def test_a_removed_or_unknown_adapter_is_never_answered_by_another(trained: TrainCase) -> None:
    served = serve([trained("classification", "uora"), trained("pairs", "lora")])
    first, second = served.digests
    expected = served.classifier.predict(["saw axe"], [second])
    served.bank.remove(first)
    for digest in (first, "0" * 64):
        with pytest.raises(AdapterNotFoundError):
            served.classifier.predict(["saw axe", "fig"], [second, digest])
    assert served.heads.rows == ()
    assert served.bank.composition is None
    assert served.classifier.predict(["saw axe"], [second]) == expected
    served.bank.put(served.runs[0].artifact)
    assert served.classifier.predict(["saw axe", "fig"], [second, first])


def test_a_failed_forward_leaves_nothing(texts: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Heads, "run", fail)
        with pytest.raises(MemoryError):
            texts.classifier.predict(["fig"], texts.digests[:1])
    assert texts.heads.rows == ()
    assert texts.bank.composition is None


def test_an_adapter_without_a_head_gives_no_classes(trained: TrainCase) -> None:
    """A chat adapter fits the layers of a classifier on the same base model, but has nothing to answer with."""
    served = serve([trained("decoder", "uora"), trained("chat", "uora")])
    with pytest.raises(AdapterNotFoundError, match="no head here"):
        served.classifier.predict(["fig", "fig"], served.digests)


def test_a_head_of_another_model_is_refused(base_of: BaseOf, trained: TrainCase) -> None:
    case = CASES["classification"]
    other = run(spec_of(case.task, "uora", n_epochs=1), base_of(make_bert_without_pooler), case)
    with pytest.raises(ShapeError, match=r"bert\.pooler\.dense"):
        serve([trained("classification", "uora")]).heads.parameters(other.artifact)


def test_the_head_runs_for_known_rows_only(base_of: BaseOf) -> None:
    base = base_of(make_tiny_bert)
    model = load_model(base, dtype=torch.float32, device="cpu", task="classification")
    Heads(model)
    with pytest.raises(AdapterNotFoundError, match="1 rows and 0 adapters"):
        model(**load_text_inputs(base).batch(["fig"]))


def test_what_cannot_be_classified(texts: Served, images: Served) -> None:
    assert texts.classifier.predict([], []) == []
    with pytest.raises(ValueError, match="2 items and 1 adapters"):
        texts.classifier.predict(["a", "b"], texts.digests[:1])
    with pytest.raises(DataError, match="takes 64"):
        texts.classifier.predict(["word " * 40], texts.digests[:1])
    with pytest.raises(DataError, match="cannot be read"):
        images.classifier.predict([b"no image"], images.digests[:1])
