"""What waits because its destination is away; a number in the outbox is never given twice."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    numbered = {"sqlite_autoincrement": True}
    with op.batch_alter_table("delivery", recreate="always", table_kwargs=numbered) as delivery:
        delivery.add_column(sa.Column("away", sa.Boolean(), nullable=False, server_default=sa.false()))
