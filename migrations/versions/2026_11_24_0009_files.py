"""Files expire, are uploaded in parts, and are reported on.

Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0010"
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("files", sa.Column("expires_at", sa.DateTime(timezone=True)))
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    _create_uploads()
    _create_parts()
    _create_reports()


def _create_uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("mime_type", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("file_seconds", sa.Integer()),
        sa.Column("file_id", sa.String()),
        sa.PrimaryKeyConstraint("seq", name="pk_uploads"),
        sa.UniqueConstraint("id", name="uq_uploads_id"),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_uploads_project_id_projects", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_uploads_project_id", "uploads", ["project_id"])
    op.create_index("ix_uploads_status_expires_at", "uploads", ["status", "expires_at"])


def _create_parts() -> None:
    op.create_table(
        "upload_parts",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("upload_id", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_upload_parts"),
        sa.UniqueConstraint("id", name="uq_upload_parts_id"),
        sa.UniqueConstraint("storage_key", name="uq_upload_parts_storage_key"),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["uploads.id"], name="fk_upload_parts_upload_id_uploads", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"])


def _create_reports() -> None:
    op.create_table(
        "file_reports",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("file_id", sa.String(), nullable=False),
        sa.Column("request", JSON, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("rows_key", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("report", JSON),
        sa.Column("footprint", JSON),
        sa.Column("error", JSON),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("seq", name="pk_file_reports"),
        sa.UniqueConstraint("id", name="uq_file_reports_id"),
        sa.UniqueConstraint("file_id", "key", name="uq_file_reports_file_id_key"),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_file_reports_project_id_projects", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name="fk_file_reports_file_id_files", ondelete="CASCADE"),
    )
    for column in ("project_id", "file_id", "status"):
        op.create_index(f"ix_file_reports_{column}", "file_reports", [column])


def downgrade() -> None:
    for table in ("file_reports", "upload_parts", "uploads"):
        op.drop_table(table)
    op.drop_index("ix_files_expires_at", "files")
    with op.batch_alter_table("files") as files:
        files.drop_column("expires_at")
