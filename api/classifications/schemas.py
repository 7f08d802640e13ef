"""Classifications on the wire: vLLM's shape, with the names of all classes, and with numbers for regressions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.classifications.engine import ImageItem, TextItem

InputItem = str | TextItem | ImageItem


class ClassificationCreate(BaseModel):
    """Body of a classification."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    input: InputItem | Annotated[list[InputItem], Field(min_length=1)]
    user: str | None = None

    @property
    def items(self) -> list[InputItem]:
        """The input as a batch."""
        return self.input if isinstance(self.input, list) else [self.input]


class ClassData(BaseModel):
    """The answer of a classifier to one item; ``probs`` is in the order of the answer's ``labels``."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class NumberData(BaseModel):
    """The answer of a regression to one item."""

    index: int
    label: None = None
    value: float
    probs: list[float] = []
    num_classes: int = 0


class ClassificationUsage(BaseModel):
    """Tokens read; images have none."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class Classification(BaseModel):
    """The answers to all items, in their order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    system_fingerprint: str
    #: Names of the classes; empty for a regression.
    labels: list[str]
    data: list[ClassData | NumberData]
    usage: ClassificationUsage
