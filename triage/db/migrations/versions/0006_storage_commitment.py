"""In which storage commitment transaction a destination was asked to keep an object"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("delivery", sa.Column("transaction_uid", sa.String(length=64), nullable=True))
    op.create_index("delivery_by_transaction", "delivery", ["transaction_uid"])
