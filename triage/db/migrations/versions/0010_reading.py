"""Who reads what, what readers say of the answers, their views; the lists are read from indices"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
KEY = ["arrived_at", "study_instance_uid"]


def upgrade() -> None:
    op.add_column("study", sa.Column("changed", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("delivery", sa.Column("changed", sa.Integer(), nullable=False, server_default="0"))
    rank = sa.Computed("CASE WHEN band = 5 THEN 4 ELSE band END", persisted=False)
    op.add_column("study", sa.Column("strict_rank", sa.Integer(), rank))
    op.add_column("study", sa.Column("strict_score", sa.Float(), sa.Computed("-score", persisted=False)))
    op.drop_index("study_by_deadline", "study")
    op.create_index(
        "study_by_deadline", "study", ["closed_at", "due_at", *KEY, "last_received_at", "band", "state"]
    )
    op.create_index(
        "study_by_strict", "study", ["closed_at", "strict_rank", "strict_score", *KEY, "last_received_at"]
    )
    op.create_index("study_by_arrival", "study", ["closed_at", *KEY, "last_received_at"])
    op.create_index("study_by_change", "study", ["changed"])
    op.create_index("delivery_by_change", "delivery", ["changed"])

    study = sa.ForeignKey("study.study_instance_uid")
    op.create_table(
        "claim",
        sa.Column("study_instance_uid", sa.String(length=64), study, primary_key=True),
        sa.Column("person", sa.Text(), nullable=False),
        sa.Column("claimed_at", sa.DateTime(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_table(
        "verdict",
        sa.Column("verdict_id", sa.Integer(), primary_key=True),
        sa.Column(
            "study_instance_uid",
            sa.String(length=64),
            sa.ForeignKey("study.study_instance_uid"),
            nullable=False,
        ),
        sa.Column("revision", sa.Integer(), nullable=True),
        sa.Column("person", sa.Text(), nullable=False),
        sa.Column("given_at", sa.DateTime(), nullable=False),
        sa.Column("opinion", sa.String(length=16), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("true_grade", sa.String(length=8), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=True),
        sa.Column("probability", sa.Float(), nullable=True),
        sa.Column("band", sa.Integer(), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("model_version", sa.Text(), nullable=True),
        sa.Column("policy_version", sa.Integer(), nullable=True),
    )
    op.create_index("verdict_by_study", "verdict", ["study_instance_uid"])
    op.create_table(
        "saved_view",
        sa.Column("person", sa.Text(), primary_key=True),
        sa.Column("name", sa.String(length=64), primary_key=True),
        sa.Column("query", sa.Text(), nullable=False),
    )
