"""Webhooks, models that are shared with other projects, and where a model comes from.

Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0008"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    _create_endpoints()
    _create_deliveries()
    _create_attempts()
    _create_permissions()
    op.add_column("adapters", sa.Column("parent", sa.String()))
    # Models that were made before: what their jobs started from.
    op.execute(
        "UPDATE adapters SET parent = (SELECT warm_start FROM jobs WHERE jobs.id = adapters.job_id) "
        "WHERE job_id IS NOT NULL"
    )
    op.add_column("jobs", sa.Column("integrations", JSON))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("integrations")
    op.drop_column("adapters", "parent")  # not in a batch, whose copy of the table would have no triggers
    op.drop_table("model_permissions")
    op.drop_table("webhook_attempts")
    op.drop_table("webhook_deliveries")
    op.drop_table("webhook_endpoints")


def _listed() -> list[sa.Column]:
    return [
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    ]


def _project(table: str, column: str = "project_id") -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], ["projects.id"], name=f"fk_{table}_{column}_projects", ondelete="CASCADE"
    )


def _keys(table: str) -> list[sa.Constraint]:
    return [sa.PrimaryKeyConstraint("seq", name=f"pk_{table}"), sa.UniqueConstraint("id", name=f"uq_{table}_id")]


def _create_endpoints() -> None:
    table = "webhook_endpoints"
    op.create_table(
        table,
        *_listed(),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("event_types", JSON, nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("old_secret", sa.String()),
        sa.Column("old_secret_until", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("failing_since", sa.DateTime(timezone=True)),
        sa.Column("disabled_at", sa.DateTime(timezone=True)),
        sa.Column("disabled_reason", sa.String()),
        _project(table),
        *_keys(table),
    )
    op.create_index("ix_webhook_endpoints_project_id", table, ["project_id"])


def _create_deliveries() -> None:
    table = "webhook_deliveries"
    op.create_table(
        table,
        *_listed(),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("endpoint_id", sa.String(), nullable=False),
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("event_type", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("delivered_at", sa.DateTime(timezone=True)),
        _project(table),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name="fk_webhook_deliveries_endpoint_id_webhook_endpoints",
            ondelete="CASCADE",
        ),
        *_keys(table),
    )
    for column in ("project_id", "endpoint_id", "job_id"):
        op.create_index(f"ix_webhook_deliveries_{column}", table, [column])
    op.create_index("ix_webhook_deliveries_status_next_attempt_at", table, ["status", "next_attempt_at"])


def _create_attempts() -> None:
    table = "webhook_attempts"
    op.create_table(
        table,
        *_listed(),
        sa.Column("delivery_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status_code", sa.Integer()),
        sa.Column("error", sa.String()),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["webhook_deliveries.id"],
            name="fk_webhook_attempts_delivery_id_webhook_deliveries",
            ondelete="CASCADE",
        ),
        *_keys(table),
    )
    op.create_index("ix_webhook_attempts_delivery_id", table, ["delivery_id"])


def _create_permissions() -> None:
    table = "model_permissions"
    op.create_table(
        table,
        *_listed(),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("shared_with", sa.String(), nullable=False),
        _project(table),
        _project(table, "shared_with"),
        sa.ForeignKeyConstraint(
            ["model"], ["adapters.id"], name="fk_model_permissions_model_adapters", ondelete="CASCADE"
        ),
        *_keys(table),
        sa.UniqueConstraint("model", "shared_with", name="uq_model_permissions_model_shared_with"),
    )
    for column in ("project_id", "model", "shared_with"):
        op.create_index(f"ix_model_permissions_{column}", table, [column])
