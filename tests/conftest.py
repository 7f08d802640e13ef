"""How the processes of the tests share a machine: what one of them does without need, all of them pay for."""

import gc
import os

import pytest

# Tiny models are fastest with one thread, and tests that run beside each other do not wait for one another's threads.
# It is here because torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing that is imported is garbage, and looking for it takes a fifth of the time.
gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported is never looked at again."""
    gc.freeze()
    gc.enable()
