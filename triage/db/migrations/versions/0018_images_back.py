"""Images that came after others of their study were deleted"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.add_column("study", sa.Column("images_back", sa.Boolean(), nullable=False, server_default="0"))
