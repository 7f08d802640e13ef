"""Base models of the settings, fetched."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from api.settings import Settings
from uora.errors import BaseModelError
from worker.collector import spared

if TYPE_CHECKING:
    from uora.models import LocalModel


@cache
def load_libraries() -> None:
    """Import what reads rows with a base model's tokenizer, which takes seconds: torch and transformers."""
    with spared():
        for name in ("uora.encoders", "uora.models", "uora.sizing"):
            import_module(name)


def find_base(settings: Settings, name: str) -> LocalModel:
    """A base model by its name in the settings.

    Raises:
        BaseModelError: there is none, or it cannot be fetched.
    """
    load_libraries()
    from uora.models import fetch

    source = settings.base_models.get(name)
    if source is None:
        raise BaseModelError(f"{name!r} is not among the base models of this process's settings.")
    return fetch(name, source, cache_dir=settings.cache_dir)
