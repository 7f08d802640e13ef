"""The state that a job goes on from, pauses, training options, tasks, warm starts and result files.

Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

#: Name, type, and the value that jobs made before have.
REQUIRED = [
    ("task", sa.String(), "chat"),
    ("options", JSON, "{}"),
    ("result_files", JSON, "[]"),
    ("pause_requested", sa.Boolean(), sa.false()),
]
OPTIONAL = [
    ("warm_start", sa.String()),
    ("warm_start_digest", sa.String()),
    ("dataset_report", JSON),
    ("stopped_early", sa.Boolean()),
    ("best_step", sa.Integer()),
]


def upgrade() -> None:
    op.create_table(
        "training_states",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
        ),
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
    )
    op.create_index("ix_training_states_job_id", "training_states", ["job_id"], unique=True)
    for name, kind in OPTIONAL:
        op.add_column("jobs", sa.Column(name, kind))
    for name, kind, value in REQUIRED:
        op.add_column("jobs", sa.Column(name, kind, nullable=False, server_default=value))
    op.add_column("jobs", sa.Column("base_model", sa.String()))
    op.execute("UPDATE jobs SET base_model = model")
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("base_model", existing_type=sa.String(), nullable=False)
        for name, kind, _ in REQUIRED:
            jobs.alter_column(name, existing_type=kind, existing_nullable=False, server_default=None)


def downgrade() -> None:
    # Release 0001 knows no pause: what waits for its user is over for it.
    op.execute("UPDATE jobs SET status = 'cancelled', finished_at = CURRENT_TIMESTAMP WHERE status = 'paused'")
    op.execute("UPDATE jobs SET model = base_model")
    with op.batch_alter_table("jobs") as jobs:
        for name in ("base_model", *(column[0] for column in (*REQUIRED, *OPTIONAL))):
            jobs.drop_column(name)
    op.drop_index("ix_training_states_job_id", "training_states")
    op.drop_table("training_states")
