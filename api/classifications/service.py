"""The gateway to the engine's classes and numbers."""

from __future__ import annotations

import time

from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.caller import Caller
from api.classifications.engine import ClassifyAnswer, ClassifyRequest, StoredAdapter, TextItem
from api.classifications.schemas import (
    ClassData,
    Classification,
    ClassificationCreate,
    ClassificationUsage,
    NumberData,
)
from api.database import new_id
from api.errors import InvalidRequest
from api.models import service as models
from api.models.service import ServedModel
from api.settings import Settings

#: Tasks whose models answer with a class or a number.
CLASSIFYING_TASKS = ("classification", "regression", "image-classification")


async def resolve(sessions: sessionmaker[Session], caller: Caller, *, name: str, settings: Settings) -> ServedModel:
    """Look the model up in a session that is closed before anything is asked of an engine."""

    def look_up() -> ServedModel:
        with sessions() as session:
            return models.resolve(session, caller, name=name, base_models=settings.base_models)

    return await run_in_threadpool(look_up)


def to_engine(body: ClassificationCreate, served: ServedModel, *, max_items: int) -> ClassifyRequest:
    """Translate a request.

    Raises:
        InvalidRequest: its model gives no classes or numbers, or it has too many items.
    """
    adapter = served.adapter
    if adapter is None or served.task not in CLASSIFYING_TASKS:
        found = "is a base model" if adapter is None else f"was trained for {served.task}"
        raise InvalidRequest(
            f"The model {served.name} {found} and gives no classes; expected a model trained for "
            f"{', '.join(CLASSIFYING_TASKS)}.",
            param="model",
            code="model_not_supported",
        )
    if len(body.items) > max_items:
        raise InvalidRequest(
            f"input: found {len(body.items)} items; expected at most {max_items}. Send them in several requests.",
            param="input",
            code="too_many_items",
        )
    return ClassifyRequest(
        base_model=served.base_model,
        adapter=StoredAdapter(id=adapter.id, digest=adapter.digest),
        items=[TextItem(text=item) if isinstance(item, str) else item for item in body.items],
    )


def to_client(answer: ClassifyAnswer, *, model: str) -> Classification:
    """The engine's answer in vLLM's shape."""
    classes = [_class(index, answer.labels, probs) for index, probs in enumerate(answer.probabilities)]
    numbers = [NumberData(index=index, value=value) for index, value in enumerate(answer.values)]
    return Classification(
        id=new_id("classify-"),
        created=int(time.time()),
        model=model,
        system_fingerprint=answer.system_fingerprint,
        labels=answer.labels,
        data=[*classes, *numbers],
        usage=ClassificationUsage(prompt_tokens=answer.prompt_tokens, total_tokens=answer.prompt_tokens),
    )


def _class(index: int, labels: list[str], probs: list[float]) -> ClassData:
    likeliest = max(range(len(probs)), key=probs.__getitem__)
    return ClassData(index=index, label=labels[likeliest], probs=probs, num_classes=len(probs))
