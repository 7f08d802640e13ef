"""``POST /classify``: a request's items and adapter made ready, and the answers put together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog

from api.classifications.engine import ClassifyAnswer, ClassifyRequest, Item, StoredAdapter, TextItem
from uora.artifact import Manifest
from uora.data.images import image_bytes
from uora.errors import AdapterNotFoundError, ArtifactError, BaseModelError, DataError
from uora.models import ImageInputs, TextInputs
from uora.serving.classification import Prediction
from uora.serving.rows import Row
from worker.engine.classifying import ClassifierHalf
from worker.engine.errors import EngineError
from worker.engine.provenance import fingerprint, provenance
from worker.engine.runner import Served

log = structlog.get_logger()

#: Of too long texts that are named in an error.
_NAMED = 5


async def classify(served: Served, body: ClassifyRequest) -> ClassifyAnswer:
    """Answer a request; being cancelled drops its items that are still waiting.

    Raises:
        EngineError: it cannot be answered.
    """
    if body.base_model != served.base.name:
        raise EngineError(404, "model_not_found", f"This engine serves {served.base.name}, not {body.base_model}.")
    half = await asyncio.to_thread(half_of, served)
    adapter = half.bank.find(body.adapter.digest)
    if adapter is None:
        adapter = await asyncio.to_thread(_load, served, half, body.adapter)
    encoded = await asyncio.to_thread(encode, half, body.items)
    predictions = await asyncio.wrap_future(served.classifying.submit(encoded, adapter))
    return _answer(served, adapter.manifest, predictions, encoded)


def half_of(served: Served) -> ClassifierHalf:
    """What classifies; raises `EngineError` if the base model cannot."""
    try:
        return served.classifying.half
    except BaseModelError as error:
        raise EngineError(400, "model_not_supported", error.message, param="model") from error


def _load(served: Served, half: ClassifierHalf, target: StoredAdapter) -> Row:
    """An adapter that is not resident, verified."""
    try:
        artifact = served.store.load(target.id, target.digest)
        half.check(artifact.manifest)
        return half.bank.put(artifact)
    except AdapterNotFoundError as error:
        raise EngineError(404, error.code, error.message) from error
    except ArtifactError as error:
        log.exception("adapter_refused", model=target.id)
        raise EngineError(500, error.code, error.message) from error


def encode(half: ClassifierHalf, items: Sequence[Item]) -> list[Any]:
    """The items as rows of the model, none of them cut.

    Raises:
        EngineError: an item is not what the model takes; named by its index (400).
    """
    rows = [_row(half.inputs, item, index) for index, item in enumerate(items)]
    if isinstance(half.inputs, TextInputs):
        lengths = [len(row["input_ids"]) for row in rows]
        _check_lengths(lengths, half.max_tokens)
    return rows


def _row(inputs: TextInputs | ImageInputs, item: Item, index: int) -> Any:
    param = f"input[{index}]"
    try:
        if isinstance(item, TextItem):
            if not isinstance(inputs, TextInputs):
                raise EngineError(400, "invalid_item", f"{param} is a text; this model takes images.", param=param)
            pair = item.text if item.text_pair is None else (item.text, item.text_pair)
            return inputs.of_any_length().encode_item(pair)
        if not isinstance(inputs, ImageInputs):
            raise EngineError(400, "invalid_item", f"{param} is an image; this model takes texts.", param=param)
        return inputs.encode_item(image_bytes(item.image))
    except DataError as error:
        raise EngineError(400, error.code, f"{param}: {error.message}", param=param) from error


def _check_lengths(lengths: Sequence[int], limit: int) -> None:
    too_long = [(index, tokens) for index, tokens in enumerate(lengths) if tokens > limit]
    if too_long:
        found = ", ".join(f"input[{index}] has {tokens}" for index, tokens in too_long[:_NAMED])
        more = f" and {len(too_long) - _NAMED} more are too long" if len(too_long) > _NAMED else ""
        message = f"This model takes {limit} tokens for one item; {found}{more}. Shorten or split them."
        raise EngineError(400, "context_length_exceeded", message, param=f"input[{too_long[0][0]}]")


def _answer(
    served: Served, manifest: Manifest, predictions: Sequence[Prediction], rows: Sequence[Any]
) -> ClassifyAnswer:
    return ClassifyAnswer(
        labels=list(manifest.labels) if manifest.task != "regression" else [],
        probabilities=[list(found.values()) for found in predictions if isinstance(found, dict)],
        values=[found for found in predictions if isinstance(found, float)],
        prompt_tokens=sum(len(row["input_ids"]) for row in rows if not isinstance(row, bytes)),
        system_fingerprint=fingerprint(served.base.digest, manifest),
        provenance=provenance(served.base.digest, manifest),
    )
