"""What engines ask for adapters: their task, one index for it, and a number that is another after every change.

Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INDEX = "ix_adapters_base_model_task_seq_digest"
POSTGRESQL = (
    """
    CREATE FUNCTION note_adapter_change() RETURNS trigger LANGUAGE plpgsql AS $$
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
)
SQLITE = tuple(
    f"""
    CREATE TRIGGER note_adapter_{change.lower()} AFTER {change} ON adapters
    BEGIN
      INSERT INTO adapter_versions (base_model, version) VALUES ({row}.base_model, 1)
      ON CONFLICT (base_model) DO UPDATE SET version = version + 1;
    END
    """
    for change, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD"))
)


def upgrade() -> None:
    op.create_table(
        "adapter_versions",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_adapter_versions"),
        sa.UniqueConstraint("base_model", name="uq_adapter_versions_base_model"),
    )
    op.add_column("adapters", sa.Column("task", sa.String()))
    op.execute("UPDATE adapters SET task = coalesce(manifest ->> 'task', 'chat')")
    with op.batch_alter_table("adapters") as adapters:
        adapters.alter_column("task", existing_type=sa.String(), nullable=False)
    op.drop_index("ix_adapters_base_model", "adapters")
    op.create_index(INDEX, "adapters", ["base_model", "task", "seq", "digest"])
    # Last: SQLite's copy of a table, above, would not have them, and PostgreSQL changes no table with pending ones.
    for statement in POSTGRESQL if op.get_context().dialect.name == "postgresql" else SQLITE:
        op.execute(statement)


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP TRIGGER note_adapter_change ON adapters")
        op.execute("DROP FUNCTION note_adapter_change")
    else:
        for change in ("insert", "update", "delete"):
            op.execute(f"DROP TRIGGER note_adapter_{change}")
    op.drop_index(INDEX, "adapters")
    op.create_index("ix_adapters_base_model", "adapters", ["base_model"])
    with op.batch_alter_table("adapters") as adapters:
        adapters.drop_column("task")
    op.drop_table("adapter_versions")
