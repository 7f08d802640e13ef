"""Classes and numbers for items of any requests in common passes, on a thread of its own.

What waits is taken in the order it came, up to a number of tokens, sorted by length so that little is padded, and cut
into passes. A pass that fails is halved until what fails is alone: nobody's item or adapter fails another's.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import structlog
from torch import Tensor
from transformers import PreTrainedModel

from api.settings import Settings
from uora.artifact import Manifest
from uora.errors import UoraError
from uora.models import (
    ImageInputs,
    LocalModel,
    TextInputs,
    load_classifier_over,
    load_image_inputs,
    load_model,
    load_text_inputs,
    pick_dtype,
)
from uora.serving.bank import AdapterBank
from uora.serving.classification import Classifier, Prediction
from uora.serving.heads import Heads
from uora.serving.rows import Row
from uora.spec import Task
from uora.svd import BaseWeights
from worker.engine.adapters import AdapterStore
from worker.engine.checking import check_classifier
from worker.engine.device_thread import DeviceThread
from worker.engine.errors import EngineError
from worker.engine.residency import Residency

log = structlog.get_logger()

#: What an image counts as: about the patches that a ViT makes of it.
IMAGE_TOKENS = 256


@dataclass(frozen=True)
class ClassifierHalf:
    """A loaded classifier.

    Attributes:
        classifier: the base model with the heads of its adapters.
        bank: its adapters.
        inputs: what makes rows of items.
        tasks: what it can be asked for.
        max_tokens: of one text.
    """

    classifier: Classifier
    bank: AdapterBank
    inputs: TextInputs | ImageInputs
    tasks: frozenset[Task]
    max_tokens: int

    def check(self, manifest: Manifest, *, param: str = "model") -> None:
        """Raises `EngineError` or `UoraError` if an adapter cannot answer here."""
        check_classifier(manifest, self.bank, self.tasks, param=param)


@dataclass(eq=False)
class _Request:
    """The items of one request."""

    adapter: Row
    found: list[Prediction | None]
    done: Future[list[Prediction]] = field(default_factory=Future)

    def answer(self, index: int, prediction: Prediction) -> None:
        self.found[index] = prediction
        complete = [each for each in self.found if each is not None]
        if len(complete) == len(self.found):
            self._end(lambda: self.done.set_result(complete))

    def fail(self, error: BaseException) -> None:
        self._end(lambda: self.done.set_exception(error))

    def _end(self, action: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # its client left, or another of its items failed
            action()


@dataclass(frozen=True, eq=False)
class _Item:
    """One item of a request, as the model takes it."""

    request: _Request
    index: int
    encoded: Any
    tokens: int


class Classifying(DeviceThread):
    """The queue of items, and the thread that answers them; stopped, it refuses what waits."""

    def __init__(
        self,
        build: Callable[[], ClassifierHalf],
        *,
        base_model: str,
        store: AdapterStore,
        turn: threading.Lock,
        max_waiting: int,
        max_tokens: int,
    ) -> None:
        """Nothing is loaded before it is asked for.

        Args:
            build: loads the classifier.
            base_model: the name whose adapters become resident once it is loaded.
            store: where they are.
            turn: to be held while the device computes.
            max_waiting: items that may wait.
            max_tokens: of a pass, padding included; a longer item has one of its own.
        """
        super().__init__("engine-classifying", turn)
        self._build = build
        self._base_model = base_model
        self._store = store
        self._max_waiting = max_waiting
        self._max_tokens = max_tokens
        self._building = threading.Lock()
        self._waiting: deque[_Item] = deque()
        self._running = 0
        self._residency: Residency | None = None

    def stop(self) -> None:
        """End the threads."""
        super().stop()
        with self._building:
            if self._residency is not None:
                self._residency.stop()

    def load(self) -> None:
        """Load the classifier now; raises as `half` does."""
        _ = self.half

    @property
    def half(self) -> ClassifierHalf:
        """The classifier, loaded when it is first asked for.

        Raises:
            BaseModelError: the base model cannot classify.
        """
        with self._building:
            return self._half

    @cached_property
    def _half(self) -> ClassifierHalf:
        with self._turn:  # heads and banks replace modules
            half = self._build()
        self._residency = self._residency_of(half)
        self._residency.start()
        return half

    def _residency_of(self, half: ClassifierHalf) -> Residency:
        return Residency(
            half.bank,
            self._store,
            base_model=self._base_model,
            tasks=half.tasks,
            check=half.check,
            on_corrupted=self.end_holders,
        )

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Items that were taken and are not answered yet."""
        return self._running

    @property
    def resident(self) -> int:
        """Adapters in memory; none before the classifier is loaded."""
        return len(self.half.bank) if self._residency is not None else 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of these."""
        return self.half.bank.bytes if self._residency is not None else 0

    def submit(self, encoded: Sequence[Any], adapter: Row) -> Future[list[Prediction]]:
        """Queue the items of one request. Cancelling the result drops them.

        Args:
            encoded: what ``inputs.encode_item`` made of the items.
            adapter: what answers, whatever becomes of it in the bank.

        Raises:
            EngineError: too many items wait already, or the engine is shutting down (503).
        """
        request = _Request(adapter, found=[None] * len(encoded))
        items = [_Item(request, index, each, tokens_of(each)) for index, each in enumerate(encoded)]
        with self._changed:
            if self._stopping:
                raise _stopping()
            if self._waiting and len(self._waiting) + len(items) > self._max_waiting:
                raise EngineError(
                    503, "engine_busy", "Too many items are waiting; try again in a moment.", retry_after=1
                )
            self._waiting.extend(items)
            self._changed.notify()
        return request.done

    def _run(self) -> None:
        while taken := self._take():
            for items in passes(taken, self._max_tokens):
                self._answer(items)
            self._running = 0
        for item in self._waiting:
            item.request.fail(_stopping())

    def _take(self) -> list[_Item]:
        """What waits, up to a pass's tokens, once something does; nothing when the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            taken: list[_Item] = []
            tokens = 0
            while self._waiting and not self._stopping and tokens < self._max_tokens:
                taken.append(self._waiting.popleft())
                tokens += taken[-1].tokens
            self._running = len(taken)
            return taken

    def _answer(self, items: list[_Item]) -> None:
        items = [item for item in items if not self._ended(item)]
        if not items:
            return
        self.on_batch(len(items))
        found = self._forward(items)
        if isinstance(found, Exception) and len(items) == 1:
            self._fail(items[0], found)
        elif isinstance(found, Exception):
            log.warning("pass_halved", items=len(items), error=repr(found))
            middle = len(items) // 2
            self._answer(items[:middle])
            self._answer(items[middle:])
        else:
            for item, prediction in zip(items, found, strict=True):
                self._tell(item, prediction)

    def _ended(self, item: _Item) -> bool:
        """Whether nobody waits for it (any more), as when its adapter was found to be corrupted."""
        done, error = item.request.done, self._condemned.get(item.request.adapter)
        if error is not None and not done.done():
            self._fail(item, error)
        return done.done()

    def _forward(self, items: list[_Item]) -> list[Prediction] | Exception:
        classifier = self.half.classifier
        try:
            with self._turn:
                return classifier.answer([item.encoded for item in items], [item.request.adapter for item in items])
        except Exception as error:  # a value, so that a later attempt does not keep this one's tensors
            return error.with_traceback(None) if len(items) > 1 else error

    def _tell(self, item: _Item, prediction: Prediction) -> None:
        if self._ended(item):
            return
        if _finite(prediction):
            item.request.answer(item.index, prediction)
        else:
            self._fail(item, ArithmeticError("the answer is not finite"))

    def _fail(self, item: _Item, error: Exception) -> None:
        log.error("classification_failed", adapter=item.request.adapter.digest, index=item.index, exc_info=error)
        message = error.message if isinstance(error, UoraError) else "The engine failed while classifying."
        code = error.code if isinstance(error, UoraError) else "classification_failed"
        item.request.fail(EngineError(500, code, message, param=f"input[{item.index}]"))


def build_encoder(
    base: LocalModel, settings: Settings, *, device: str, tasks: frozenset[Task], budget: int
) -> ClassifierHalf:
    """A model that only reads; ``budget`` bytes are for its adapters.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    task: Task = "image-classification" if "image-classification" in tasks else "classification"
    model = load_model(base, dtype=pick_dtype(settings.dtype), device=device, task=task)
    return _half_of(base, model, settings, task=task, budget=budget)


def build_over(
    base: LocalModel, parameters: Mapping[str, Tensor], settings: Settings, *, budget: int
) -> ClassifierHalf:
    """A classifier that shares the parameters of a text model; ``budget`` bytes are for its adapters.

    Raises:
        BaseModelError: there is none of its kind.
    """
    model = load_classifier_over(base, parameters)
    return _half_of(base, model, settings, task="classification", budget=budget)


def _half_of(
    base: LocalModel, model: PreTrainedModel, settings: Settings, *, task: Task, budget: int
) -> ClassifierHalf:
    heads = Heads(model)  # before the bank, which adapts what is left
    weights = BaseWeights.of_local(base, task, settings.cache_dir)
    bank = AdapterBank(model, base_digest=base.digest, weights=weights, heads=heads, budget=budget)
    if task == "image-classification":
        images = load_image_inputs(base)
        return ClassifierHalf(Classifier(model, images, bank, heads), bank, images, frozenset({task}), IMAGE_TOKENS)
    texts = load_text_inputs(base)
    tasks: frozenset[Task] = frozenset({"classification", "regression"})
    limit = min(settings.engine_max_tokens, texts.max_tokens)
    return ClassifierHalf(Classifier(model, texts, bank, heads), bank, texts, tasks, limit)


def tokens_of(encoded: Any) -> int:
    """Tokens of an item in a pass."""
    return IMAGE_TOKENS if isinstance(encoded, bytes) else len(encoded["input_ids"])


def passes(items: Sequence[_Item], max_tokens: int) -> Iterator[list[_Item]]:
    """The items by length, in batches that have at most ``max_tokens`` when all are as long as the longest."""
    batch: list[_Item] = []
    for item in sorted(items, key=lambda item: item.tokens):
        if batch and item.tokens * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _finite(prediction: Prediction) -> bool:
    return all(map(math.isfinite, prediction.values() if isinstance(prediction, dict) else [prediction]))


def _stopping() -> EngineError:
    return EngineError(503, "engine_stopping", "The engine is shutting down; try again in a moment.", retry_after=1)
