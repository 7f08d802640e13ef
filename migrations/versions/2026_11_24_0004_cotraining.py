"""Which jobs can be trained together; those that are there already are trained each by itself.

Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cotraining_key", sa.String(64)))
    op.create_index("ix_jobs_cotraining_key_status", "jobs", ["cotraining_key", "status"])


def downgrade() -> None:
    op.drop_index("ix_jobs_cotraining_key_status", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("cotraining_key")
