"""What other systems say of a study by its accession number: STAT, or read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from triage.db import records
from triage.db.tables import stat_order, study
from triage.domain import News, Priority, Reported, Study
from triage.errors import Rejected

Pending = Callable[[datetime, bool], Priority]
"""(arrival, is it a STAT order) → place of a study that nobody has judged yet."""

FORGOTTEN_AFTER = timedelta(days=60)
"""A RIS may give an accession number again after years."""


def hear(connection: Connection, told: News, pending: Pending, now: datetime) -> list[tuple[str, str]]:
    """What it changed, as (study's UID, its change). Raises Rejected for another patient's report."""
    if isinstance(told, Reported):
        uids = close(connection, told.accession_number, told.patient_ids, told.reason, now)
        return [(uid, f"is closed: {told.reason}") for uid in uids]
    remember(connection, told.accession_number, told.stat, now)
    moved = move_up(connection, told.accession_number, pending) if told.stat else []
    return [(uid, "was ordered STAT") for uid in moved]


def remember(connection: Connection, accession_number: str, stat: bool, now: datetime) -> None:
    """Keep a STAT order for images to come; forget it when it was changed or cancelled, and old ones."""
    connection.execute(delete(stat_order).where(stat_order.c.ordered_at < now - FORGOTTEN_AFTER))
    if stat:
        known = insert(stat_order).values(accession_number=accession_number, ordered_at=now)
        connection.execute(known.on_conflict_do_update(set_={"ordered_at": now}))
    else:
        connection.execute(delete(stat_order).where(stat_order.c.accession_number == accession_number))


def is_stat(connection: Connection, accession_number: str) -> bool:
    query = select(stat_order.c.accession_number).where(stat_order.c.accession_number == accession_number)
    return connection.execute(query).first() is not None


def move_up(connection: Connection, accession_number: str, pending: Pending) -> list[str]:
    """Studies of a STAT order take their new place; the UIDs of those that were not STAT before."""
    query = select(study).where(study.c.accession_number == accession_number, study.c.stat.is_(False))
    found = connection.execute(query).mappings().all()
    for row in found:
        place = records.priority_of(row).ordered_stat(pending(row["arrived_at"], True).due_at)
        connection.execute(
            update(study)
            .where(study.c.study_instance_uid == row["study_instance_uid"])
            .values(stat=True, **records.priority_values(place))
        )
    return [row["study_instance_uid"] for row in found]


def place_values(connection: Connection, seen: Study, place: Priority) -> dict[str, Any]:
    """Column values of a place found for a study as it was seen: it may have become STAT in the meantime."""
    query = select(study).where(study.c.study_instance_uid == seen.study_instance_uid)
    row = connection.execute(query).mappings().first()
    if row is not None and row["stat"] and not seen.stat:
        place = place.ordered_stat(row["due_at"])
    return records.priority_values(place)


def close(
    connection: Connection, accession_number: str, patient_ids: Collection[str], reason: str, now: datetime
) -> list[str]:
    """Close the open studies; raises Rejected when they are another patient's. The UIDs of those closed."""
    query = select(study).where(study.c.accession_number == accession_number, study.c.closed_at.is_(None))
    found = connection.execute(query).mappings().all()
    for row in found:
        if patient_ids and row["patient_id"] and row["patient_id"] not in patient_ids:
            raise Rejected("the study with this accession number here has another patient ID: not closed")
    uids = [row["study_instance_uid"] for row in found]
    connection.execute(
        update(study).where(study.c.study_instance_uid.in_(uids)).values(closed_at=now, closed_reason=reason)
    )
    return uids
