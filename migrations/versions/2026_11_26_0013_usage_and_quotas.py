"""The usage ledger, what jobs have come to for it, and quotas of projects.

Revises: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
#: SQLite counts up by itself only in an INTEGER primary key.
SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
QUOTAS = ("jobs_running", "jobs_queued", "bytes_stored", "requests_per_minute", "tokens_per_minute")
KEY = ("project_id", "minute", "key_id", "model", "operation", "job_id")


def upgrade() -> None:
    op.create_table(
        "usage_records",
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("minute", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in KEY[2:]),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("requests", "input_tokens", "output_tokens", "trained_tokens", "items")
        ),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.UniqueConstraint(*KEY),
    )
    op.create_index("ix_usage_records_minute", "usage_records", ["minute"])
    op.create_table(
        "usage_writers",
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
    )
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("key_id", sa.String()))
        for name, kind in (("tokens", sa.BigInteger()), ("seconds", sa.Double())):
            jobs.add_column(sa.Column(f"run_{name}", kind, nullable=False, server_default="0"))
            jobs.add_column(sa.Column(f"counted_{name}", kind, nullable=False, server_default="0"))
    with op.batch_alter_table("projects") as projects:
        for name in QUOTAS:
            projects.add_column(sa.Column(name, sa.BigInteger()))


def downgrade() -> None:
    with op.batch_alter_table("projects") as projects:
        for name in QUOTAS:
            projects.drop_column(name)
    with op.batch_alter_table("jobs") as jobs:
        for name in ("counted_seconds", "run_seconds", "counted_tokens", "run_tokens", "key_id"):
            jobs.drop_column(name)
    op.drop_table("usage_writers")
    op.drop_table("usage_records")
