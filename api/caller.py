"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass

from api.errors import MissingScope, OrganizationKeyRequired
from api.scopes import Scope


@dataclass(frozen=True)
class Caller:
    """The project that a request acts for, and the key it came with."""

    project_id: str
    project_slug: str
    key_id: str
    scopes: frozenset[Scope] = frozenset()
    #: Whether ``admin`` reaches all projects, not only the key's own.
    organization_wide: bool = False

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
