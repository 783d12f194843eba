"""What the archive said of a study's missing images"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.batch_alter_table("study") as study:
        study.add_column(sa.Column("completeness", sa.Text(), nullable=True))
