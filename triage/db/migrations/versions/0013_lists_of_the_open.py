"""The lists are read from indices of the open studies alone, also where they are filtered"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
KEY = ["arrived_at", "study_instance_uid"]
ASKED = ["last_received_at", "band", "state", "status", "scanner", "study_description", "searched"]
ORDERS = {
    "deadline": ["due_at", *KEY],
    "strict": ["strict_rank", "strict_score", *KEY, "due_at"],
    "arrival": [*KEY, "due_at"],
}
STATUS = (
    "CASE state WHEN 'analyzed' THEN answer WHEN 'rejected' THEN 'not_analysable'"
    " WHEN 'failed' THEN 'failed' END"
)
SEARCHED = (
    "lower(patient_id || char(10) || patient_name || char(10) ||"
    " accession_number || char(10) || study_instance_uid)"
)


def upgrade() -> None:
    for column in (
        sa.Column("scanner", sa.Text(), nullable=False, server_default=""),
        sa.Column("answer", sa.String(length=16)),
        sa.Column("probability", sa.Float()),
        sa.Column("affected_fraction", sa.Float()),
        sa.Column("judged_at", sa.DateTime()),
        sa.Column("forgotten", sa.Boolean(), nullable=False, server_default="0"),
        sa.Column("status", sa.String(length=16), sa.Computed(STATUS, persisted=False)),
        sa.Column("searched", sa.Text(), sa.Computed(SEARCHED, persisted=False)),
    ):
        op.add_column("study", column)
    for ordering in ORDERS:
        op.drop_index(f"study_by_{ordering}", "study")
    op.execute(
        "UPDATE study SET scanner = coalesce((SELECT json_extract(facts, '$.scanner') FROM instance"
        " WHERE instance.study_instance_uid = study.study_instance_uid AND judgeable LIMIT 1), '')"
    )
    op.execute(
        "UPDATE study SET answer = newest.status, judged_at = newest.created_at,"
        " probability = json_extract(newest.document, '$.probability'),"
        " affected_fraction = json_extract(newest.document, '$.affected_fraction')"
        " FROM (SELECT *, max(revision) FROM result WHERE status IN ('positive', 'negative')"
        " GROUP BY study_instance_uid) AS newest"
        " WHERE newest.study_instance_uid = study.study_instance_uid"
    )
    still_open = sa.text("closed_at IS NULL AND forgotten IS 0")
    for ordering, columns in ORDERS.items():
        op.create_index(f"study_by_{ordering}", "study", [*columns, *ASKED], sqlite_where=still_open)
    op.drop_index("study_by_day", "study")
    op.create_index("study_by_day", "study", ["arrived_at", "state", "searched"])
