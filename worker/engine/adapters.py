"""Adapters from the database, verified before they are used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker, undefer

from api.models.models import Adapter, AdapterVersion
from uora.artifact import Artifact, loads
from uora.errors import AdapterNotFoundError, DigestError

#: Artifacts in memory at the same time: pairs of matrices have tens of megabytes each.
_AT_ONCE = 5


@dataclass(frozen=True)
class Stored:
    """An adapter's row: the digest that it should have, and its bytes as they are."""

    digest: str
    data: bytes

    def load(self) -> Artifact:
        """Verify it.

        Raises:
            ArtifactError: the bytes are not what the digest says.
        """
        artifact = loads(self.data)
        found = artifact.manifest.digest
        if found != self.digest:
            raise DigestError(
                f"The database holds the adapter {found[:16]}... in the row of {self.digest[:16]}.... Restore the row "
                "from a backup or train the adapter again."
            )
        return artifact


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

    def version(self, base_model: str) -> int | None:
        """Of a base model's adapters: another one after every change; None before the first."""
        with self._sessions() as session:
            return session.scalar(select(AdapterVersion.version).where(AdapterVersion.base_model == base_model))

    def digests(self, base_model: str, tasks: Collection[str]) -> dict[str, int]:
        """Of a base model's adapters for these tasks, newest first, each with the ``seq`` of a row that has it."""
        wanted = select(Adapter.digest, Adapter.seq).where(Adapter.base_model == base_model, Adapter.task.in_(tasks))
        found: dict[str, int] = {}
        with self._sessions() as session:
            for digest, seq in session.execute(wanted.order_by(Adapter.seq.desc())):
                found.setdefault(digest, seq)
        return found

    def read(self, seqs: Sequence[int]) -> Iterator[Stored]:
        """The rows that are still there, newest first, not verified."""
        wanted = select(Adapter.digest, Adapter.artifact).where(Adapter.seq.in_(seqs)).order_by(Adapter.seq.desc())
        with self._sessions() as session:
            for digest, data in session.execute(wanted, execution_options={"yield_per": _AT_ONCE}):
                yield Stored(digest, data)
