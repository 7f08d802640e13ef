"""The api with a real engine, for the tests of this folder."""

from tests.worker.engine.world import world  # noqa: F401 - pytest finds fixtures by their names here
