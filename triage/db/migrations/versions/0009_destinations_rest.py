"""Until when a destination wants to be left alone"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "rest",
        sa.Column("destination", sa.String(length=64), primary_key=True),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
