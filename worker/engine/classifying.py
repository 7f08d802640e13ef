"""Classes and numbers for items of any requests in common passes, on a thread of its own.

What waits is taken in the order it came, up to a number of tokens, sorted by length so that little is padded, and cut
into passes. A pass that fails is halved until what fails is alone: nobody's item or adapter fails another's.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import structlog
from torch import Tensor
from transformers import PreTrainedModel

from api.settings import Settings
from uora.artifact import Artifact
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
from uora.spec import Task
from uora.svd import BaseWeights
from worker.engine.errors import EngineError

log = structlog.get_logger()

#: What an image counts as: about the patches that a ViT makes of it.
IMAGE_TOKENS = 256


@dataclass(frozen=True)
class ClassifierHalf:
    """A loaded classifier.

    Attributes:
        classifier: the base model with the heads of its adapters.
        bank: its adapters; only the thread of `Classifying` may change it.
        inputs: what makes rows of items.
        tasks: what it can be asked for.
        max_tokens: of one text.
    """

    classifier: Classifier
    bank: AdapterBank
    inputs: TextInputs | ImageInputs
    tasks: frozenset[Task]
    max_tokens: int


@dataclass(eq=False)
class _Request:
    """The items of one request."""

    digest: str
    artifact: Artifact | None
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
    """One row of a request."""

    request: _Request
    index: int
    row: Any
    tokens: int


class Classifying:
    """The queue of items, and the thread that answers them."""

    def __init__(
        self,
        build: Callable[[], ClassifierHalf],
        *,
        turn: threading.Lock,
        max_waiting: int,
        max_tokens: int,
        max_adapters: int,
    ) -> None:
        """Nothing is loaded before it is asked for.

        Args:
            build: loads the classifier.
            turn: to be held while the device computes.
            max_waiting: items that may wait.
            max_tokens: of a pass, padding included; a longer row has one of its own.
            max_adapters: that stay resident while no request needs them.
        """
        self._build = build
        self._turn = turn
        self._max_waiting = max_waiting
        self._max_tokens = max_tokens
        self._max_adapters = max_adapters
        self._building = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._running = 0
        self._stopping = False
        #: Digests of resident adapters, the longest unused first, and how many requests hold each.
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._holders: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="engine-classifying", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its pass; what waits is refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

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
            return self._build()

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
        """Adapters in memory."""
        return len(self._resident)

    @contextmanager
    def holding(self, digest: str) -> Iterator[bool]:
        """Within the context the adapter is not evicted; gives whether it is resident."""
        with self._changed:
            self._holders[digest] += 1
            resident = digest in self._resident
        try:
            yield resident
        finally:
            with self._changed:
                self._holders[digest] -= 1
                if not self._holders[digest]:
                    del self._holders[digest]

    def submit(self, rows: Sequence[Any], digest: str, artifact: Artifact | None) -> Future[list[Prediction]]:
        """Queue the items of one request, whose adapter the caller is `holding`. Cancelling the result drops them.

        Args:
            rows: what ``inputs.encode_item`` made of the items.
            digest: the adapter's.
            artifact: the adapter, verified and checked, if it was not resident.

        Raises:
            EngineError: too many items wait already, or the engine is shutting down (503).
        """
        request = _Request(digest, artifact, found=[None] * len(rows))
        items = [_Item(request, index, row, tokens_of(row)) for index, row in enumerate(rows)]
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
        items = [item for item in items if not item.request.done.done()]
        if not items:
            return
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

    def _forward(self, items: list[_Item]) -> list[Prediction] | Exception:
        half = self.half
        try:
            with self._turn:
                self._make_resident(half.bank, items)
                digests = [item.request.digest for item in items]
                return half.classifier.answer([item.row for item in items], digests)
        except Exception as error:  # a value, so that a later attempt does not keep this one's tensors
            return error.with_traceback(None) if len(items) > 1 else error

    def _tell(self, item: _Item, prediction: Prediction) -> None:
        if _finite(prediction):
            item.request.answer(item.index, prediction)
        else:
            self._fail(item, ArithmeticError("the answer is not finite"))

    def _fail(self, item: _Item, error: Exception) -> None:
        log.error("classification_failed", adapter=item.request.digest, index=item.index, exc_info=error)
        message = error.message if isinstance(error, UoraError) else "The engine failed while classifying."
        code = error.code if isinstance(error, UoraError) else "classification_failed"
        item.request.fail(EngineError(500, code, message, param=f"input[{item.index}]"))

    def _make_resident(self, bank: AdapterBank, items: list[_Item]) -> None:
        needed = {item.request.digest: item.request.artifact for item in items}
        new = [artifact for digest, artifact in needed.items() if artifact is not None and digest not in bank]
        self._evict(bank, len(self._resident) + len(new) - self._max_adapters, keep=needed.keys())
        for artifact in new:
            bank.put(artifact)
        with self._changed:
            for digest in filter(bank.__contains__, needed):
                self._resident[digest] = None
                self._resident.move_to_end(digest)

    def _evict(self, bank: AdapterBank, count: int, *, keep: Collection[str]) -> None:
        """Remove so many adapters, but none that a request holds."""
        with self._changed:
            free = [digest for digest in self._resident if digest not in self._holders and digest not in keep]
            evicted = free[: max(0, count)]
            for digest in evicted:
                del self._resident[digest]
        for digest in evicted:
            bank.remove(digest)


def build_encoder(base: LocalModel, settings: Settings, *, device: str, tasks: frozenset[Task]) -> ClassifierHalf:
    """A model that only reads.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    task: Task = "image-classification" if "image-classification" in tasks else "classification"
    model = load_model(base, dtype=pick_dtype(settings.dtype), device=device, task=task)
    return _half_of(base, model, settings, task=task)


def build_over(base: LocalModel, parameters: Mapping[str, Tensor], settings: Settings) -> ClassifierHalf:
    """A classifier that shares the parameters of a text model.

    Raises:
        BaseModelError: there is none of its kind.
    """
    return _half_of(base, load_classifier_over(base, parameters), settings, task="classification")


def _half_of(base: LocalModel, model: PreTrainedModel, settings: Settings, *, task: Task) -> ClassifierHalf:
    heads = Heads(model)  # before the bank, which adapts what is left
    weights = BaseWeights.of_local(base, task, settings.cache_dir)
    bank = AdapterBank(model, base_digest=base.digest, weights=weights, heads=heads)
    if task == "image-classification":
        images = load_image_inputs(base)
        return ClassifierHalf(Classifier(model, images, bank, heads), bank, images, frozenset({task}), IMAGE_TOKENS)
    texts = load_text_inputs(base)
    tasks: frozenset[Task] = frozenset({"classification", "regression"})
    limit = min(settings.engine_max_tokens, texts.max_tokens)
    return ClassifierHalf(Classifier(model, texts, bank, heads), bank, texts, tasks, limit)


def tokens_of(row: Any) -> int:
    """Tokens of a row in a pass."""
    return IMAGE_TOKENS if isinstance(row, bytes) else len(row["input_ids"])


def passes(items: Sequence[_Item], max_tokens: int) -> Iterator[list[_Item]]:
    """The items by length, in batches that have at most ``max_tokens`` when all rows are as long as the longest."""
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
