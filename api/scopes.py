"""What a key may do, and which of it each route needs. This is the only place that says so."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Scope(StrEnum):
    """One permission of a key. None implies another."""

    #: Every GET of the project's files, jobs and models.
    READ = "read"
    #: Every change of them.
    WRITE = "write"
    #: Answers of models.
    INFER = "infer"
    #: Keys, who may use what, the audit log, usage, quotas; with an organization-wide key, projects too.
    ADMIN = "admin"


EVERY_SCOPE = frozenset(Scope)
#: What a new key has unless its maker says otherwise.
MEMBER_SCOPES = frozenset({Scope.READ, Scope.WRITE, Scope.INFER})

#: Paths, with all below them, that need something else than their method says.
_BY_PATH = {
    "/v1/organization": Scope.ADMIN,
    "/v1/fine_tuning/checkpoints": Scope.ADMIN,
    "/v1/chat/completions": Scope.INFER,
    "/v1/completions": Scope.INFER,
    "/v1/classify": Scope.INFER,
    "/dashboard/keys": Scope.ADMIN,
}


def needed_scope(method: str, path: str) -> Scope:
    """The scope that a request needs. A route that nobody thought of is a read or a change, by its method."""
    for beginning, scope in _BY_PATH.items():
        if path == beginning or path.startswith(beginning + "/"):
            return scope
    return Scope.READ if method in ("GET", "HEAD") else Scope.WRITE


def join_scopes(scopes: Iterable[Scope]) -> str:
    """As they are stored: in alphabetical order, separated by spaces."""
    return " ".join(sorted(set(scopes)))


def split_scopes(stored: str) -> frozenset[Scope]:
    """As they are used."""
    return frozenset(Scope(name) for name in stored.split())
