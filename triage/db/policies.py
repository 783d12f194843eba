"""Versions of the policy, what decides each study's place, and the new order in one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, insert, select, update

from triage.config import PriorityPolicy
from triage.db import records
from triage.db.tables import policy, result, study, verdict
from triage.domain import Grade, Priority, Result, Standing, Status, StudyState
from triage.errors import Rejected

JUDGED = (Status.POSITIVE, Status.NEGATIVE)
Placed = tuple[Standing, Priority]
"""A study as it was read, and the place that it is to have."""


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
    """Studies with what decides their places: figures are taken out of the answers inside the database."""
    other = result.alias()
    newest = (
        select(func.max(other.c.revision))
        .where(other.c.study_instance_uid == study.c.study_instance_uid, other.c.status.in_(JUDGED))
        .scalar_subquery()
    )
    joined = study.outerjoin(
        result, and_(result.c.study_instance_uid == study.c.study_instance_uid, result.c.revision == newest)
    )
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
            result.c.status,
            result.c.created_at.label("judged_at"),
            result.c.document["probability"].as_float().label("probability"),
            result.c.document["affected_fraction"].as_float().label("affected_fraction"),
        )
        .select_from(joined)
        .where(chosen)
        .order_by(*order)
        .limit(limit)
    )
    return [_standing(row) for row in connection.execute(query)]


def place(connection: Connection, placed: Sequence[Placed]) -> None:
    """Give studies their new places, but those whose place has changed since it was read: that is newer."""
    ours = (
        (study.c.study_instance_uid == bindparam("uid"))
        & (study.c.band == bindparam("old_band"))
        & (study.c.score == bindparam("old_score"))
        & (study.c.due_at == bindparam("old_due_at"))
    )
    change = update(study).where(ours)
    rows = [
        {
            "uid": seen.study_instance_uid,
            "old_band": int(seen.priority.band),
            "old_score": seen.priority.score,
            "old_due_at": seen.priority.due_at,
            "band": int(new.band),
            "score": new.score,
            "due_at": new.due_at,
        }
        for seen, new in placed
    ]
    if rows:
        connection.execute(change, rows)


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
    answer = None
    if row.status is not None:
        answer = Result(
            study_instance_uid=row.study_instance_uid,
            patient_id="",
            status=Status(row.status),
            reason="",
            probability=row.probability,
            affected_fraction=row.affected_fraction,
        )
    return Standing(
        study_instance_uid=row.study_instance_uid,
        state=StudyState(row.state),
        arrived_at=row.arrived_at,
        stat=row.stat,
        priority=records.priority_of(row._mapping),
        result=answer,
        judged_at=row.judged_at,
        closed_at=row.closed_at,
        patient_name=row.patient_name,
        accession_number=row.accession_number,
    )
