"""Rows of the study table → worklist entries, and the orderings."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, func, select

from triage.db import records
from triage.db.tables import delivery, instance, result, study
from triage.domain import DeliveryState, Status, WorklistEntry

ORDERINGS: dict[str, tuple[ColumnElement[Any], ...]] = {
    "deadline": (study.c.due_at, study.c.arrived_at, study.c.study_instance_uid),
    "strict": (study.c.strict_rank, study.c.strict_score, study.c.arrived_at, study.c.study_instance_uid),
    "arrival": (study.c.arrived_at, study.c.study_instance_uid),
}
"""The key of each order, all ascending: each has an index. Studies that were not judged rank with the
indeterminate ones, above routine (``strict_rank``); the higher score goes first (``strict_score``)."""


def is_open(now: datetime, leave_after_days: float) -> ColumnElement[bool]:
    """On the list: not closed, and not forgotten for days. New images bring an old study back."""
    return study.c.closed_at.is_(None) & (study.c.last_received_at > now - timedelta(days=leave_after_days))


def entries(connection: Connection, rows: Sequence[RowMapping]) -> list[WorklistEntry]:
    """Worklist rows with their newest result, slice and delivery counts: three queries for all.

    That a study was given up is no result: what was found before still explains its place.
    """
    uids = [row["study_instance_uid"] for row in rows]
    results = {
        uid: records.result_of(document)
        for uid, document in connection.execute(
            select(result.c.study_instance_uid, result.c.document)
            .where(result.c.study_instance_uid.in_(uids), result.c.status != Status.FAILED)
            .order_by(result.c.revision)
        )
    }
    images: dict[str, int] = {}
    for uid, count in connection.execute(
        select(instance.c.study_instance_uid, func.count())
        .where(instance.c.study_instance_uid.in_(uids), instance.c.judgeable)
        .group_by(instance.c.study_instance_uid)
    ):
        images[uid] = count
    deliveries: dict[str, dict[DeliveryState, int]] = {}
    for uid, state, count in connection.execute(
        select(delivery.c.study_instance_uid, delivery.c.state, func.count())
        .where(delivery.c.study_instance_uid.in_(uids))
        .group_by(delivery.c.study_instance_uid, delivery.c.state)
    ):
        deliveries.setdefault(uid, {})[DeliveryState(state)] = count
    return [
        WorklistEntry(
            study=records.study_of(row),
            priority=records.priority_of(row),
            result=results.get(row["study_instance_uid"]),
            images=images.get(row["study_instance_uid"], 0),
            deliveries=deliveries.get(row["study_instance_uid"], {}),
        )
        for row in rows
    ]
