"""Adapters from the database, verified before they are used."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker, undefer

from api.models.models import Adapter
from uora.artifact import Artifact, loads
from uora.errors import AdapterNotFoundError, DigestError


class AdapterStore:
    """Reads adapter rows. The api has checked that the caller may use the model; ``digest`` is what it saw."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions

    def load(self, model: str, digest: str) -> Artifact:
        """Read and verify one adapter.

        Raises:
            AdapterNotFoundError: it was deleted meanwhile.
            ArtifactError: the row's bytes are not what its digest says.
        """
        with self._sessions() as session:
            row = session.scalar(select(Adapter).where(Adapter.id == model).options(undefer(Adapter.artifact)))
        if row is None:
            raise AdapterNotFoundError(f"Model {model} does not exist (any more).")
        artifact = loads(row.artifact)
        if artifact.manifest.digest != digest:
            raise DigestError(
                f"Model {model}: the request names digest {digest[:16]}..., the database holds "
                f"{artifact.manifest.digest[:16]}.... It was replaced in between; send the request again."
            )
        return artifact
