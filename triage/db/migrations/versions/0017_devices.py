"""On which device a role computes"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.add_column("role", sa.Column("device", sa.String(length=8)))
