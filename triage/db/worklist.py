"""Which studies are on the list, in which order, and where each stands; rows → worklist entries."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    String,
    and_,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    tuple_,
)

from triage.db import records
from triage.db.tables import UtcDateTime, claim, delivery, instance, result, study
from triage.domain import Band, DeliveryState, Status, StudyState, WorklistEntry
from triage.errors import Rejected

ORDERINGS: dict[str, tuple[ColumnElement[Any], ...]] = {
    "deadline": (study.c.due_at, study.c.arrived_at, study.c.study_instance_uid),
    "strict": (study.c.strict_rank, study.c.strict_score, study.c.arrived_at, study.c.study_instance_uid),
    "arrival": (study.c.arrived_at, study.c.study_instance_uid),
}
"""The key of each order, all ascending; each has an index. Studies that were not judged rank with the
indeterminate ones, above routine (``strict_rank``); the higher score goes first (``strict_score``)."""
ON_THE_LIST = study.c.closed_at.is_(None) & study.c.forgotten.is_(False)
"""What the indices of the orders hold (``tables.OPEN``): by and by only what really is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which open studies are wanted; what is left empty leaves nothing out."""

    bands: frozenset[Band] = frozenset()
    states: frozenset[StudyState] = frozenset()
    statuses: frozenset[Status | None] = frozenset()
    """None is an answer that is pending."""
    claimed_by: str | None = None
    unclaimed: bool = False
    text: str = ""
    description: str = ""
    scanner: str = ""
    arrived_since: datetime | None = None
    overdue: bool = False


def is_open(now: datetime, leave_after_days: float) -> ColumnElement[bool]:
    """On the list: not closed, and not forgotten for days. New images bring an old study back."""
    return ON_THE_LIST & (study.c.last_received_at > now - timedelta(days=leave_after_days))


def listed(now: datetime, ordering: str, leave_after_days: float) -> Select[Any]:
    """Open studies in reading order: what every list is made of."""
    return select(study).where(is_open(now, leave_after_days)).order_by(*ORDERINGS[ordering])


def wanted(now: datetime, chosen: Chosen) -> ColumnElement[bool]:
    """Of open studies, those that were chosen."""
    tests: list[ColumnElement[bool]] = []
    if chosen.bands:
        tests.append(study.c.band.in_(chosen.bands))
    if chosen.states:
        tests.append(alone(study.c.state).in_(chosen.states))
    if chosen.statuses:
        tests.append(or_(*(study.c.status.is_not_distinct_from(status) for status in chosen.statuses)))
    claimed = select(claim.c.study_instance_uid).where(claim.c.until > now)
    if chosen.claimed_by is not None:
        tests.append(study.c.study_instance_uid.in_(claimed.where(claim.c.person == chosen.claimed_by)))
    if chosen.unclaimed:
        tests.append(study.c.study_instance_uid.not_in(claimed))
    if chosen.text:
        tests.append(matches(chosen.text))
    if chosen.description:
        tests.append(_holds(func.lower(study.c.study_description), chosen.description))
    if chosen.scanner:
        tests.append(_holds(func.lower(study.c.scanner), chosen.scanner))
    if chosen.arrived_since is not None:
        tests.append(alone(study.c.arrived_at) >= chosen.arrived_since)
    if chosen.overdue:
        tests.append(study.c.due_at <= now)
    return and_(true(), *tests)


def matches(text: str) -> ColumnElement[bool]:
    """Some part of the patient's name or ID, the accession number or the UID is this."""
    return _holds(study.c.searched, text)


def alone(column: Column[Any]) -> ColumnElement[Any]:
    """As it is, but SQLite's plus keeps it from using any other index than that of the order."""
    return literal_column(f"+study.{column.name}", column.type)


def _holds(column: ColumnElement[str], text: str) -> ColumnElement[bool]:
    """Unlike LIKE this has no signs of its own, and is three times as quick."""
    return func.instr(column, func.lower(text)) > 0


# --- keys: the place of a row in an ordering ------------------------------------------------------


def place(ordering: str) -> Any:
    return tuple_(*ORDERINGS[ordering])


def place_of(ordering: str, values: Iterable[Any]) -> Any:
    """To compare ``place`` with."""
    return tuple_(*(literal(value, of.type) for value, of in zip(values, ORDERINGS[ordering], strict=True)))


def key_of(ordering: str, row: RowMapping) -> str:
    """The place of a row as text."""
    values = [row[str(column.key)] for column in ORDERINGS[ordering]]
    plain = [value.isoformat() if isinstance(value, datetime) else value for value in values]
    return base64.urlsafe_b64encode(json.dumps([ordering, *plain]).encode()).decode().rstrip("=")


def place_in(ordering: str, key: str) -> Any:
    """The place that a key tells; Rejected when it is none of this ordering."""
    columns = ORDERINGS[ordering]
    try:
        named, *plain = json.loads(base64.urlsafe_b64decode(key.encode() + b"=" * (-len(key) % 4)))
        if named != ordering or len(plain) != len(columns):
            raise ValueError(named)
        values = [_value(column, value) for column, value in zip(columns, plain, strict=True)]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Rejected("this place is none of the list as it is ordered now") from error
    return place_of(ordering, values)


def _value(column: ColumnElement[Any], value: Any) -> Any:
    if isinstance(column.type, UtcDateTime):
        return datetime.fromisoformat(value).astimezone(UTC)
    expected = str if isinstance(column.type, String) else (int, float)
    if not isinstance(value, expected):
        raise TypeError(value)
    return value if isinstance(value, str) else float(value)


# --- rows ------------------------------------------------------------------------------------------


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
