"""What the page of one study shows of others."""

from __future__ import annotations

from sqlalchemy import Connection, and_, or_, select

from triage.db.tables import study
from triage.db.worklist import entries
from triage.domain import Study, WorklistEntry


def priors(connection: Connection, shown: Study, limit: int) -> list[WorklistEntry]:
    """Earlier studies of the same patient, the latest first: by StudyDate, of one day by arrival.

    None where the patient or the day is not known: other people's studies must never be taken for priors.
    """
    if not shown.patient_id or not shown.study_date:
        return []
    earlier = or_(
        study.c.study_date < shown.study_date,
        and_(study.c.study_date == shown.study_date, study.c.arrived_at < shown.arrived_at),
    )
    query = (
        select(study)
        .where(study.c.patient_id == shown.patient_id, study.c.study_date != "", earlier)
        .order_by(study.c.study_date.desc(), study.c.arrived_at.desc(), study.c.study_instance_uid)
        .limit(limit)
    )
    return entries(connection, connection.execute(query).mappings().all())
