"""What a project may have and do. Its own values are columns of its row; where it has none, the settings' hold."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from api.projects.models import Project
from api.settings import Settings


@dataclass(frozen=True)
class Quotas:
    """Limits of one project; 0 is no limit."""

    jobs_running: int = 0
    #: Those whose files are checked included.
    jobs_queued: int = 0
    bytes_stored: int = 0
    #: Of chat and other completions and classifications.
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    @classmethod
    def of(cls, project: Project, settings: Settings) -> Self:
        """What holds for a project."""
        own = {name: getattr(project, name) for name in QUOTAS}
        return cls(
            **{name: getattr(settings, f"quota_{name}") if value is None else int(value) for name, value in own.items()}
        )


#: Names of quotas, which are columns of projects too.
QUOTAS = tuple(field.name for field in fields(Quotas))
