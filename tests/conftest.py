"""How the processes of the tests share a machine: what one of them does without need, all of them pay for."""

import gc
import os

import pytest

# Tiny models are fastest with one thread, and tests that run beside each other do not wait for one another's threads.
# It is here because torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing that is imported is garbage, and looking for it takes a fifth of the time.
gc.disable()


#: Fixtures that start servers or load models. Tests that share one run in one process, which makes it once; none of
#: them lasts for the whole session, in which each process would gather the servers of all.
SHARED = ("running", "seen", "dashboard", "processes", "world", "engine", "whole", "twofold")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups after it
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the groups that pytest-xdist keeps together (``--dist loadgroup``)."""
    for item in items:
        names = getattr(item, "fixturenames", ())
        if shared := next((name for name in SHARED if name in names), None):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            folder = item.path.parent if shared in ("running", "dashboard", "world") else item.path
            item.add_marker(pytest.mark.xdist_group(f"{folder.stem}-{shared}-{parameters.get(shared, '')}"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported is never looked at again."""
    gc.freeze()
    gc.enable()
    if session.config.getoption("loadgroup", False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        # As for pytest 9.2 it does not: every process would start every server, and nothing would say so.
        assert all("@" in item.nodeid for item in grouped), "pytest-xdist does not see the groups of tests."
