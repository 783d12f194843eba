"""STAT orders whose images have not come yet, and which studies the RIS was asked about"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "stat_order",
        sa.Column("accession_number", sa.Text(), nullable=False),
        sa.Column("ordered_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("accession_number"),
    )
    with op.batch_alter_table("study") as study:
        study.add_column(sa.Column("priority_asked_at", sa.DateTime(), nullable=True))
