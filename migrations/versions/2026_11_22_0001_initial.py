"""Projects, keys, files, jobs with their events and checkpoints, adapters.

Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def listed() -> list[sa.Column]:
    """Columns of every row that is paged through."""
    return [
        # SQLite counts up by itself only in an INTEGER primary key.
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
        ),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("created_at", TIME, nullable=False),
    ]


def owned_by(table: str, *, nullable: bool = False) -> sa.Column:
    """A reference to ``projects.id`` or ``jobs.id``, with an index."""
    return sa.Column(
        f"{table[:-1]}_id",
        sa.String(),
        sa.ForeignKey(f"{table}.id", ondelete="SET NULL" if nullable else "CASCADE"),
        nullable=nullable,
        index=True,
    )


def upgrade() -> None:
    op.create_table(
        "projects",
        *listed(),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("slug", sa.String(), nullable=False, unique=True),
    )
    op.create_table(
        "api_keys",
        *listed(),
        owned_by("projects"),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("secret_sha256", sa.String(), nullable=False, unique=True),
        sa.Column("last_used_at", TIME),
        sa.Column("revoked_at", TIME),
    )
    op.create_table(
        "files",
        *listed(),
        owned_by("projects"),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False, unique=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("status_details", sa.String()),
        sa.Column("deleted_at", TIME),
    )
    op.create_table(
        "jobs",
        *listed(),
        owned_by("projects"),
        sa.Column("status", sa.String(), nullable=False, index=True),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("training_file", sa.String(), nullable=False),
        sa.Column("validation_file", sa.String()),
        sa.Column("suffix", sa.String()),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("labels", JSON),
        sa.Column("hyperparameters", JSON, nullable=False),
        sa.Column("adapter", JSON, nullable=False),
        sa.Column("learning_rate", sa.Double()),
        sa.Column("training_spec", JSON),
        sa.Column("progress", JSON),
        sa.Column("error", JSON),
        sa.Column("trained_tokens", sa.BigInteger()),
        sa.Column("fine_tuned_model", sa.String()),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("estimated_finish", TIME),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lost_trainers", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String()),
        sa.Column("lease_until", TIME),
    )
    op.create_table(
        "job_events",
        *listed(),
        owned_by("jobs"),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", JSON),
    )
    op.create_table(
        "checkpoints",
        *listed(),
        owned_by("jobs"),
        sa.Column("step_number", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
    )
    op.create_table(
        "adapters",
        *listed(),
        owned_by("projects"),
        owned_by("jobs", nullable=True),
        sa.Column("base_model", sa.String(), nullable=False, index=True),
        sa.Column("checkpoint_step", sa.Integer()),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("manifest", JSON, nullable=False),
        sa.Column("artifact", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    for table in ("adapters", "checkpoints", "job_events", "jobs", "files", "api_keys", "projects"):
        op.drop_table(table)
