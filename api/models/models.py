"""Fine-tuned models. A model is this row: its vectors, and the manifest that rebuilds the rest from seeds."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Connection, ForeignKey, Index, LargeBinary, Table, event, func
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import Mapped, column_property, mapped_column

from api.database import Base, Listed, Sequence


def _task_of(context: DefaultExecutionContext) -> str:
    task: str = context.get_current_parameters()["manifest"].get("task", "chat")  # type: ignore[no-untyped-call]
    return task


class Adapter(Base, Listed):
    """A servable adapter; ``id`` is the model name clients use (``ft:<base>:<org>:<suffix>:<id>``)."""

    __tablename__ = "adapters"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    base_model: Mapped[str]
    #: ``uora.spec.Task``, as its manifest says.
    task: Mapped[str] = mapped_column(default=_task_of)
    #: Optimizer step of a checkpoint; None for a job's final model. Only final models are listed.
    checkpoint_step: Mapped[int | None]
    #: The fine-tuned model that its training started from, there or not; None if that was the base model.
    parent: Mapped[str | None]
    #: Digest of the artifact (``uora.artifact``), checked wherever the bytes are used.
    digest: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    #: The whole artifact: safetensors with the manifest in its header.
    artifact: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    #: Its size, which is told without reading it; for those who ask.
    artifact_bytes: Mapped[int] = column_property(func.length(artifact), deferred=True)

    #: All that an engine reads of the adapters that it might load, so that it need not read the rows.
    __table_args__ = (Index(None, "base_model", "task", "seq", "digest"),)


class AdapterVersion(Base):
    """Another number after every transaction that changed adapters of a base model.

    Triggers write it, so that nothing goes by unnoticed, whoever deletes or replaces rows. Engines ask for it twice a
    second, which costs the same however many adapters there are.
    """

    __tablename__ = "adapter_versions"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    base_model: Mapped[str] = mapped_column(unique=True)
    version: Mapped[int] = mapped_column(BigInteger)


#: On PostgreSQL at the commit, so that the row's lock is held for the shortest time, and once in a transaction.
_NOTES_OF_CHANGES = {
    "postgresql": (
        """
        CREATE OR REPLACE FUNCTION note_adapter_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          INSERT INTO adapter_versions (base_model, version)
          VALUES (coalesce(NEW.base_model, OLD.base_model), pg_current_xact_id()::text::bigint)
          ON CONFLICT (base_model) DO UPDATE SET version = excluded.version
          WHERE adapter_versions.version <> excluded.version;
          RETURN NULL;
        END $$
        """,
        """
        CREATE CONSTRAINT TRIGGER note_adapter_change AFTER INSERT OR UPDATE OR DELETE ON adapters
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note_adapter_change()
        """,
    ),
    "sqlite": tuple(
        f"""
        CREATE TRIGGER note_adapter_{change.lower()} AFTER {change} ON adapters
        BEGIN
          INSERT INTO adapter_versions (base_model, version) VALUES ({row}.base_model, 1)
          ON CONFLICT (base_model) DO UPDATE SET version = version + 1;
        END
        """  # noqa: S608 # of the words below
        for change, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD"))
    ),
}


@event.listens_for(Adapter.__table__, "after_create")
def _note_changes(_table: Table, connection: Connection, **_options: Any) -> None:
    for statement in _NOTES_OF_CHANGES[connection.dialect.name]:
        connection.exec_driver_sql(statement)
