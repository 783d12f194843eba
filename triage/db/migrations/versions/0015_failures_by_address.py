"""Wrong passwords are counted by address, too; those of the last day are forgotten"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.drop_table("login_failure")
    op.create_table(
        "login_failure",
        sa.Column("name", sa.String(length=64), primary_key=True),
        sa.Column("address", sa.String(length=64), primary_key=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("last_at", sa.DateTime(), nullable=False),
        sa.Column("locked_until", sa.DateTime(), nullable=True),
    )
