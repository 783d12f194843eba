"""Versions of the policy, what decides each study's place, and the new order in one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, insert, select

from triage.config import PriorityPolicy
from triage.db.tables import NEXT_CHANGE, policy, study, verdict
from triage.domain import JUDGED, Band, Figures, Grade, Priority, Result, Standing, Status, StudyState
from triage.errors import Rejected

Placed = tuple[int, float, str, str, int, float]
"""New band, score and due time of a study; then its UID, and the band and score that it was read with.

Plain values, which the garbage collector leaves alone: there can be a hundred thousand.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVersion:
    """What ordered from ``created_at`` on, until the next version."""

    version: int
    author: str
    reason: str
    created_at: datetime
    policy: PriorityPolicy


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a reader said of an answer: all that tells what it should have been."""

    study_instance_uid: str
    opinion: str
    status: Status | None
    true_grade: Grade | None


def versions(connection: Connection, limit: int) -> list[PolicyVersion]:
    """The newest on top."""
    rows = connection.execute(select(policy).order_by(policy.c.version.desc()).limit(limit)).all()
    return [_version(row) for row in rows]


def version(connection: Connection, number: int) -> PolicyVersion | None:
    row = connection.execute(select(policy).where(policy.c.version == number)).first()
    return _version(row) if row else None


def add(
    connection: Connection, new: PriorityPolicy, author: str, reason: str, now: datetime, after: int
) -> int:
    """The number of the new version; raises Rejected when version ``after`` is not the newest any more."""
    known = connection.execute(select(func.max(policy.c.version))).scalar() or 0
    if known != after:
        raise Rejected(f"version {known} was saved in the meantime: look at it first")
    values = {"author": author, "reason": reason, "created_at": now, "document": new.model_dump(mode="json")}
    connection.execute(insert(policy).values(version=known + 1, **values))
    return int(known) + 1


def standings(
    connection: Connection, chosen: ColumnElement[bool], order: Sequence[ColumnElement[Any]], limit: int
) -> list[Standing]:
    """Studies with what decides their places."""
    query = (
        select(
            study.c.study_instance_uid,
            study.c.state,
            study.c.arrived_at,
            study.c.stat,
            study.c.band,
            study.c.score,
            study.c.due_at,
            study.c.priority_reason,
            study.c.closed_at,
            study.c.patient_name,
            study.c.accession_number,
            study.c.answer,
            study.c.judged_at,
            study.c.probability,
            study.c.affected_fraction,
        )
        .where(chosen)
        .order_by(*order)
        .limit(limit)
    )
    return [_standing(row) for row in connection.execute(query)]


def figures(answer: Result, now: datetime) -> dict[str, Any]:
    """What a new answer leaves on its study's row; nothing when it is neither positive nor negative."""
    if answer.status not in JUDGED:
        return {}
    return {
        "answer": answer.status,
        "probability": answer.probability,
        "affected_fraction": answer.affected_fraction,
        "judged_at": now,
    }


def placed(study: Standing, new: Priority) -> Placed:
    """The row that gives a study its new place."""
    due_at = new.due_at.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    uid, old = study.study_instance_uid, study.priority
    return int(new.band), new.score, due_at, uid, int(old.band), old.score


def place(connection: Connection, rows: Sequence[Placed]) -> None:
    """Give studies their new places, but those whose place has changed since it was read: that is newer."""
    if not rows:
        return
    number = int(connection.execute(select(NEXT_CHANGE)).scalar_one())
    connection.exec_driver_sql(f"PRAGMA cache_size = {-LARGE_CACHE_KIB}")
    try:
        for begin in range(0, len(rows), AT_ONCE):
            piece = rows[begin : begin + AT_ONCE]
            places = ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(piece))
            values = tuple(chain.from_iterable(piece))
            connection.exec_driver_sql(_PLACE.format(number=number, places=places), values)
    finally:
        connection.exec_driver_sql(f"PRAGMA cache_size = {-CACHE_KIB}")


AT_ONCE = 5_000
"""Studies in one statement: before each, a busy process lets other threads go first, the database locked."""
CACHE_KIB, LARGE_CACHE_KIB = 2_000, 256_000
"""SQLite's own, and one for the pages of a hundred thousand studies: each is written once, at the end."""
_PLACE = """
UPDATE study SET band = column1, score = column2, due_at = column3, changed = {number}
FROM (VALUES {places}) WHERE study_instance_uid = column4 AND band = column5 AND score = column6
"""
"""Columns of ``Placed``."""


def opinions(connection: Connection, since: datetime) -> Iterator[Opinion]:
    """The newest verdict on each study that arrived since then."""
    other = verdict.alias()
    newest = (
        select(func.max(other.c.verdict_id))
        .where(other.c.study_instance_uid == verdict.c.study_instance_uid)
        .scalar_subquery()
    )
    query = (
        select(verdict.c.study_instance_uid, verdict.c.opinion, verdict.c.status, verdict.c.true_grade)
        .join(study)
        .where(study.c.arrived_at >= since, verdict.c.verdict_id == newest)
    )
    for uid, said, status, grade in connection.execute(query):
        yield Opinion(uid, said, Status(status) if status else None, Grade(grade) if grade else None)


def _version(row: Any) -> PolicyVersion:
    return PolicyVersion(
        version=row.version,
        author=row.author,
        reason=row.reason,
        created_at=row.created_at,
        policy=PriorityPolicy.model_validate(row.document),
    )


def _standing(row: Any) -> Standing:
    uid, state, arrived_at, stat, band, score, due_at, reason, closed_at, name, accession_number, *answer = (
        row
    )
    status, judged_at, probability, fraction = answer
    return Standing(
        study_instance_uid=uid,
        state=StudyState(state),
        arrived_at=arrived_at,
        stat=stat,
        priority=Priority(Band(band), score, due_at, reason),
        result=None if status is None else Figures(Status(status), probability, fraction),
        judged_at=judged_at,
        closed_at=closed_at,
        patient_name=name,
        accession_number=accession_number,
    )
