"""Versions of the policy; studies, answers and deliveries are found by their day"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

INDICES = {
    "study_by_day": ("study", "arrived_at"),
    "result_by_creation": ("result", "created_at"),
    "delivery_by_creation": ("delivery", "created_at"),
}


def upgrade() -> None:
    op.create_table(
        "policy",
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("version"),
        sqlite_autoincrement=True,
    )
    for name, (table, column) in INDICES.items():
        op.create_index(name, table, [column])
