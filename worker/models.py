"""Base models of the settings, fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from api.settings import Settings
from uora.errors import BaseModelError

if TYPE_CHECKING:
    from uora.models import LocalModel


def find_base(settings: Settings, name: str) -> LocalModel:
    """A base model by its name in the settings.

    Raises:
        BaseModelError: there is none, or it cannot be fetched.
    """
    from uora.models import fetch  # loads torch, which takes seconds

    source = settings.base_models.get(name)
    if source is None:
        raise BaseModelError(f"{name!r} is not among the base models of this process's settings.")
    return fetch(name, source, cache_dir=settings.cache_dir)
