"""Which objects a destination has newer ones of: they are never sent to it again."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    flag = sa.Boolean()
    op.add_column("delivery", sa.Column("superseded", flag, nullable=False, server_default=sa.false()))
