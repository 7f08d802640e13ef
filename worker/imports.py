"""Imports that take seconds, made cheaper: those of torch, transformers and peft."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def spared() -> Iterator[None]:
    """Import inside what takes seconds.

    Nothing of it is garbage, and looking for some takes a third of the time. Nor is it looked for among all that
    later. peft imports bitsandbytes wherever it is installed, which takes a third of the rest and asks CUDA for its
    devices; here only a quantised base model does so.
    """
    put_off("bitsandbytes")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
