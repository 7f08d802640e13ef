"""Removes bytes that nobody will ask for again: of expired files and uploads, and of writers that died."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from itertools import islice

from api.database import database_now, now
from api.files import repository as files
from api.unit_of_work import open_unit_of_work
from api.uploads import repository as uploads
from api.uploads.models import UploadStatus
from worker.context import Resources

logger = logging.getLogger(__name__)

#: Files or uploads of one transaction.
MAX_EXPIRED = 100
#: A writer of an object is done with it, and with its row, long before.
ORPHAN_AGE = timedelta(days=1)
_KEYS_OF_QUERY = 500


def remove_expired(held: Resources) -> None:
    """Forget files that have expired and that no unfinished job reads, and uploads that were not completed."""
    with open_unit_of_work(held.sessions, held.queue) as work:
        session = work.session
        moment = database_now(session)
        keys = []
        for file in files.lock_expired(session, moment=moment, limit=MAX_EXPIRED):
            files.mark_deleted(session, file)
            keys.append(file.storage_key)
        for upload in uploads.lock_expired(session, moment=moment, limit=MAX_EXPIRED):
            upload.status = UploadStatus.EXPIRED
            keys += uploads.drop_parts(session, upload)
        for key in keys:
            work.on_commit(partial(held.storage.delete, key))


def tidy(held: Resources) -> None:
    """Remove objects that no row names: their writer died, or whoever should have removed them did."""
    before = now() - ORPHAN_AGE
    torn = held.storage.remove_torn(before)
    orphans = 0
    old = iter(held.storage.old_keys(before))
    while keys := list(islice(old, _KEYS_OF_QUERY)):
        with held.sessions() as session:
            known = files.known_keys(session, keys) | uploads.known_keys(session, keys)
        unknown = set(keys) - known
        for key in unknown:
            held.storage.delete(key)
        orphans += len(unknown)
    if torn or orphans:
        logger.warning("removed %d half-written objects and %d that no row names", torn, orphans)
