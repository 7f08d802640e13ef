"""Scopes, expiry and rotation of keys; the audit log; answers kept for requests that come again.

Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0009"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
EVERY_SCOPE = "admin infer read write"


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


def upgrade() -> None:
    with op.batch_alter_table("projects") as projects:
        projects.add_column(sa.Column("archived_at", TIME))
    with op.batch_alter_table("api_keys") as keys:
        # Whoever has a key today may do what it could do yesterday.
        keys.add_column(sa.Column("scopes", sa.String(), nullable=False, server_default=EVERY_SCOPE))
        keys.add_column(sa.Column("organization_wide", sa.Boolean(), nullable=False, server_default=sa.false()))
        keys.add_column(sa.Column("previous_sha256", sa.String()))
        keys.add_column(sa.Column("previous_until", TIME))
        keys.add_column(sa.Column("expires_at", TIME))
        keys.create_unique_constraint("uq_api_keys_previous_sha256", ["previous_sha256"])
    # The one that the first start printed is the operator's.
    op.execute(
        "UPDATE api_keys SET organization_wide = true WHERE name = 'first key' AND project_id = "
        "(SELECT id FROM projects WHERE name = 'default' ORDER BY seq LIMIT 1)"
    )
    with op.batch_alter_table("api_keys") as keys:
        keys.alter_column("scopes", existing_type=sa.String(), existing_nullable=False, server_default=None)
        keys.alter_column(
            "organization_wide", existing_type=sa.Boolean(), existing_nullable=False, server_default=None
        )
    op.create_table(
        "audit_logs",
        *listed(),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), index=True),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False, index=True),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("ip_address", sa.String()),
        sa.Column("details", JSON),
    )
    op.create_table(
        "idempotency_records",
        *(column for column in listed() if column.name != "id"),
        sa.Column("digest", sa.String(), nullable=False, unique=True),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("body", sa.Text()),
        sa.Column("object_id", sa.String()),
    )
    op.create_index("ix_idempotency_records_created_at", "idempotency_records", ["created_at"])


def downgrade() -> None:
    # The release before knows no bounds of a key: what had any must not be without.
    op.execute(
        "UPDATE api_keys SET revoked_at = CURRENT_TIMESTAMP WHERE revoked_at IS NULL AND "
        f"(scopes <> '{EVERY_SCOPE}' OR expires_at IS NOT NULL OR project_id IN "
        "(SELECT id FROM projects WHERE archived_at IS NOT NULL))"
    )
    op.drop_table("idempotency_records")
    op.drop_table("audit_logs")
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_constraint("uq_api_keys_previous_sha256", type_="unique")
        for column in ("expires_at", "previous_until", "previous_sha256", "organization_wide", "scopes"):
            keys.drop_column(column)
    with op.batch_alter_table("projects") as projects:
        projects.drop_column("archived_at")
