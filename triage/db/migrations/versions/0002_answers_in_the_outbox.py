"""The outbox also holds answers: a revision instead of an object."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
OBJECT = {
    "sop_instance_uid": sa.String(length=64),
    "sop_class_uid": sa.String(length=64),
    "path": sa.Text(),
}


def upgrade() -> None:
    with op.batch_alter_table("delivery") as delivery:
        delivery.add_column(sa.Column("revision", sa.Integer(), nullable=True))
        for name, kind in OBJECT.items():
            delivery.alter_column(name, existing_type=kind, nullable=True)
    op.create_index(
        "delivery_of_answer", "delivery", ["destination", "study_instance_uid", "revision"], unique=True
    )
