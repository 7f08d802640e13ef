"""Services that a job's measurements are sent to, beside its events."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.errors import UnsupportedParameter
from api.settings import Settings

#: OpenAI's.
MAX_INTEGRATIONS = 5
Text = Annotated[str, Field(min_length=1, max_length=128)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]


class WandbTarget(BaseModel):
    """Where a run is logged to."""

    model_config = ConfigDict(extra="forbid")

    project: Text
    name: Text | None = None
    entity: Text | None = None
    tags: Annotated[list[Tag], Field(max_length=50)] | None = None


class Integration(BaseModel):
    """Weights & Biases, the only one."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["wandb"]
    wandb: WandbTarget


Integrations = Annotated[list[Integration], Field(max_length=MAX_INTEGRATIONS)]


def check_offered(wanted: Sequence[Integration] | None, settings: Settings) -> None:
    """Refuse what would be dropped in silence.

    Raises:
        UnsupportedParameter: this installation sends nothing to Weights & Biases.
    """
    if not wanted:
        return
    missing = None
    if importlib.util.find_spec("wandb") is None:
        missing = "its library is not installed: pip install 'uora[wandb]'"
    elif settings.wandb_mode == "online" and settings.wandb_api_key is None:
        missing = "it has no key: set UORA_WANDB_API_KEY, or UORA_WANDB_MODE=offline"
    if missing:
        raise UnsupportedParameter(
            f"This service logs nothing to Weights & Biases: {missing} (its operator can). Leave integrations out.",
            param="integrations",
        )
