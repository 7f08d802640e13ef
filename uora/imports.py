"""Modules that others import, and that few use."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class PutOff(ModuleType):
    """Stands for a module until something of it is asked for; only then is the module imported.

    ``importlib.util.LazyLoader`` would import it as soon as somebody asks whether it is installed.
    """

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def put_off(name: str) -> None:
    """Let the module be imported when something of it is used; nothing, if it was imported or is not installed."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = PutOff(name)
    module.__spec__, module.__file__ = spec, spec.origin  # which inspect asks every module for
    sys.modules[name] = module
