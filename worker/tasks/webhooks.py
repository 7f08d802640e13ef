"""``webhooks.deliver``: try one delivery, and record what came of it."""

from __future__ import annotations

from worker.context import resources
from worker.delivering import deliver


def run(delivery_id: str) -> None:
    """Deliver, unless the row says that it is not due."""
    deliver(resources(), delivery_id)
