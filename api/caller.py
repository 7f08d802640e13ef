"""Who asks."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from api.errors import MissingScope, OrganizationKeyRequired
from api.quotas.models import Quotas
from api.scopes import Scope

#: How long a good key is believed to be good.
CALLER_SECONDS = 1.0
#: Keys that are remembered at once.
MAX_CALLERS = 10_000


@dataclass(frozen=True)
class Caller:
    """The project that a request acts for, and the key it came with."""

    project_id: str
    project_slug: str
    key_id: str
    scopes: frozenset[Scope] = frozenset()
    #: Whether ``admin`` reaches all projects, not only the key's own.
    organization_wide: bool = False
    #: The project's, as old as the rest.
    quotas: Quotas = field(default_factory=Quotas)

    def require(self, scope: Scope) -> None:
        """Raises ``MissingScope`` if the key does not have it."""
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes)) or "none"
            raise MissingScope(
                f"You have insufficient permissions for this operation. Missing scopes: {scope}. The key has: {has}; "
                "ask an administrator of the project for a key with it."
            )

    def require_organization(self) -> None:
        """Raises ``OrganizationKeyRequired`` if the key's reach ends at its project."""
        if not self.organization_wide:
            raise OrganizationKeyRequired(
                "This needs an organization-wide admin key; the key in use administers its own project only."
            )


class RecentCallers:
    """Who sent what headers a moment ago; refusals are not kept, and no key is."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[Caller, float]] = {}
        self._finding: dict[bytes, asyncio.Task[Caller]] = {}

    async def get(self, sent: str, find: Callable[[], Awaitable[Caller]]) -> Caller:
        """Who it was, or is found to be: once for all who send the same meanwhile. Raises what ``find`` does."""
        digest = hashlib.sha256(sent.encode(errors="surrogateescape")).digest()
        kept = self._kept.get(digest)
        if kept and time.monotonic() - kept[1] < CALLER_SECONDS:
            return kept[0]
        finding = self._finding.get(digest)
        if finding is None:
            finding = self._finding[digest] = asyncio.create_task(self._find(digest, find))
        return await asyncio.shield(finding)  # one of those who wait for it may leave

    async def _find(self, digest: bytes, find: Callable[[], Awaitable[Caller]]) -> Caller:
        asked_at = time.monotonic()  # what the database says is at least as new
        try:
            caller = await find()
        finally:
            del self._finding[digest]
        if len(self._kept) >= MAX_CALLERS:
            self._kept.clear()
        self._kept[digest] = (caller, asked_at)
        return caller
