"""When the RIS was last asked for a study's priority and gave no answer"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("study", sa.Column("priority_tried_at", sa.DateTime(), nullable=True))
