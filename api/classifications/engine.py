"""The engine's internal ``POST /classify``; the bodies are defined here for both sides."""

from __future__ import annotations

from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.engines.client import EngineClient
from api.engines.provenance import Provenance
from api.errors import EngineUnavailable

log = structlog.get_logger(__name__)


class TextItem(BaseModel):
    """A text, or a pair of texts."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str | None = None


class ImageItem(BaseModel):
    """An image as a data URL."""

    model_config = ConfigDict(extra="forbid")

    image: str


Item = TextItem | ImageItem


class StoredAdapter(BaseModel):
    """The adapter that must answer: ``id`` names its row, whose bytes must have ``digest``."""

    id: str
    digest: str


class ClassifyRequest(BaseModel):
    """Body of the request: all items are answered by one adapter."""

    model_config = ConfigDict(extra="forbid")

    base_model: str
    adapter: StoredAdapter
    items: Annotated[list[Item], Field(min_length=1)]


class ClassifyAnswer(BaseModel):
    """The answers, in the order of the items.

    Attributes:
        labels: names of the classes; none for a regression.
        probabilities: of every item, in the order of ``labels``; none for a regression.
        values: a regression's numbers.
        prompt_tokens: of all items.
        system_fingerprint: names what answered.
        provenance: its parts.
    """

    labels: list[str]
    probabilities: list[list[float]]
    values: list[float]
    prompt_tokens: int
    system_fingerprint: str
    provenance: Provenance


async def classify(engine: EngineClient, request: ClassifyRequest) -> ClassifyAnswer:
    """Ask an engine; errors are those of `EngineClient.post`."""
    response = await engine.post(
        "/classify", request.model_dump(), base_model=request.base_model, model=request.adapter.id
    )
    try:
        answer = ClassifyAnswer.model_validate_json(response.content)
    except ValidationError as error:
        log.exception("engine_answer_not_understood")
        raise EngineUnavailable("The engine's answer could not be read; its log and the api's tell more.") from error
    items, found = len(request.items), len(answer.probabilities) + len(answer.values)
    if found != items or any(len(row) != len(answer.labels) for row in answer.probabilities):
        raise EngineUnavailable(f"The engine answered {found} of {items} items; try again.", code="engine_protocol")
    return answer
