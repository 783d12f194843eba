"""Signs of life and counts of every role; when images were deleted; deliveries by when they were taken"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.create_table(
        "role",
        sa.Column("name", sa.String(length=16), primary_key=True),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("beat_at", sa.DateTime()),
        sa.Column("starts", sa.Integer(), nullable=False),
    )
    op.create_table(
        "tally",
        sa.Column("what", sa.String(length=32), primary_key=True),
        sa.Column("kind", sa.String(length=64), primary_key=True),
        sa.Column("count", sa.Integer(), nullable=False),
    )
    op.add_column("study", sa.Column("images_deleted_at", sa.DateTime()))
    op.create_index("delivery_by_sending", "delivery", ["sent_at"])
