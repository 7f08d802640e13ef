"""Deliveries of webhooks. Their rows are the truth: a message only says that one may be due.

An attempt is claimed in one transaction, made without any, and recorded in another. A worker that is killed in between
leaves a row that is due again when its hold runs out; the receiver may then get the same ``webhook-id`` twice.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from api.database import now
from api.queue import TaskName
from api.webhooks import repository, service
from api.webhooks.sending import send
from worker import metrics
from worker.context import Resources

logger = logging.getLogger(__name__)

#: Longer than an attempt can take, so that no two are under way.
HOLD = timedelta(seconds=60)


def deliver(held: Resources, delivery_id: str) -> None:
    """Try a delivery once, unless it is not due."""
    with held.sessions.begin() as session:
        claimed = repository.claim(session, delivery_id, hold=HOLD)
    if claimed is None:
        return
    message = service.message_of(claimed, at=now())
    sent = asyncio.run(send(message, allow_private=held.settings.webhook_allow_private))
    with held.sessions.begin() as session:
        service.record(session, claimed, sent)
    metrics.DELIVERIES.labels(f"{sent.status_code // 100}xx" if sent.status_code else "error").inc()
    logger.info("delivery %s, attempt %d: %s", delivery_id, claimed.attempt, sent.status_code or sent.error)


def ring(held: Resources, job_id: str) -> None:
    """Have the deliveries of a job that just ended made now; without this the sweeper would ring a little later."""
    try:
        with held.sessions() as session:
            due = repository.due(session, limit=service.MAX_ENDPOINTS, job_id=job_id)
        for delivery_id in due:
            held.queue.send(TaskName.DELIVER, delivery_id)
    except Exception:  # the job's end is recorded, and must not seem otherwise
        logger.warning("job %s: its webhooks wait for the sweeper", job_id, exc_info=True)
