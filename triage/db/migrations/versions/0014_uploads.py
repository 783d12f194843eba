"""What people bring in over the page"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.create_table(
        "upload",
        sa.Column("upload_id", sa.Integer(), primary_key=True),
        sa.Column("person", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("completed_at", sa.DateTime(), nullable=True),
        sa.Column("passed_over", sa.Integer(), nullable=False),
        sa.Column("examples", sa.JSON(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("upload_by_person", "upload", ["person"])
    op.create_table(
        "upload_study",
        sa.Column("upload_id", sa.Integer(), sa.ForeignKey("upload.upload_id"), primary_key=True),
        sa.Column(
            "study_instance_uid",
            sa.String(length=64),
            sa.ForeignKey("study.study_instance_uid"),
            primary_key=True,
        ),
    )
    op.create_index("upload_of_study", "upload_study", ["study_instance_uid"])
