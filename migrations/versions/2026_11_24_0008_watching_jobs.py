"""Counters that tell watchers whether a job changed, the job that another was made of, and indexes in list order.

Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None

#: The table, and the column by which its rows are found or their lists are told apart.
LISTS = [("jobs", "project_id"), ("jobs", "status"), ("job_events", "job_id"), ("checkpoints", "job_id")]


def upgrade() -> None:
    op.add_column("jobs", sa.Column("origin_job", sa.String()))
    op.add_column("jobs", sa.Column("version", sa.BigInteger(), nullable=False, server_default="1"))
    op.add_column("jobs", sa.Column("event_count", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET event_count = (SELECT count(*) FROM job_events WHERE job_events.job_id = jobs.id)")
    for table, column in LISTS:
        op.create_index(f"ix_{table}_{column}_seq", table, [column, "seq"])
        op.drop_index(f"ix_{table}_{column}", table)


def downgrade() -> None:
    for table, column in LISTS:
        op.create_index(f"ix_{table}_{column}", table, [column])
        op.drop_index(f"ix_{table}_{column}_seq", table)
    with op.batch_alter_table("jobs") as jobs:
        for name in ("origin_job", "version", "event_count"):
            jobs.drop_column(name)
