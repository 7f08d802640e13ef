"""The garbage collector, while seconds' worth of modules are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spared() -> Iterator[None]:
    """Import inside: nothing of it is garbage, and looking for some takes a third of the time. Nor is it looked for
    among all that later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
