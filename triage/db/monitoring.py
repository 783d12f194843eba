"""Figures of the last days: how much came, how fast it was on the list, what failed, how scores are spread.

Every query begins with an index on time and is bounded, so that the page stays quick beside a full archive.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, exists, func, select

from triage.db.tables import delivery, instance, result, study
from triage.domain import JUDGED, DeliveryState, Status, StudyState

MOST_TIMES = 20_000
"""Answers and deliveries whose times are looked at, the newest."""
MOST_SCORES = 3_000
"""Answers of one period whose scores are compared, the newest."""
MOST_REASONS = 20
UNFINISHED = (
    DeliveryState.PENDING,
    DeliveryState.GIVEN_UP,
    DeliveryState.COMMITTING,
    DeliveryState.NOT_COMMITTED,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """So many studies that got no answer for the same reason."""

    status: Status
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one answer, and what its images were made with; "" where they do not say."""

    probability: float
    scanner: str
    kernel: str
    thickness: float | None


@dataclass(frozen=True, slots=True)
class Answered:
    """One revision of an answer, and when what led to it happened; ``seconds`` of judging by stage."""

    key: tuple[str, int]
    status: Status
    first_image_at: datetime
    last_image_at: datetime
    judged_at: datetime
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Taken:
    """One object or answer that a destination took."""

    key: int
    destination: str
    owed_at: datetime
    taken_at: datetime


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a destination has not taken, or not committed: how many are in this state, and tried in vain."""

    destination: str
    state: DeliveryState
    count: int
    tried: int
    since: datetime


class Monitoring:
    """Only reads."""

    def __init__(self, read: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._read = read

    def arrivals(self, since: datetime, offset: timedelta) -> dict[str, dict[StudyState, int]]:
        """Studies that arrived, by day (as ``2026-03-01``) and the state they are in now.

        ``offset`` is local time's from UTC.
        """
        shift = f"{int(offset.total_seconds() // 60):+d} minutes"
        day = func.strftime("%Y-%m-%d", study.c.arrived_at, shift)
        query = (
            select(day, study.c.state, func.count())
            .where(study.c.arrived_at >= since)
            .group_by(day, study.c.state)
        )
        days: dict[str, dict[StudyState, int]] = {}
        with self._read() as connection:
            for date, state, count in connection.execute(query):
                days.setdefault(date, {})[StudyState(state)] = count
        return days

    def times_to_list(self, since: datetime) -> list[tuple[datetime, timedelta]]:
        """Of the newest answers: when each was on the list, and how long after the last slice of its study.

        An answer whose study got more images since is left out.
        """
        query = (
            select(result.c.created_at, study.c.last_received_at)
            .join(study)
            .where(result.c.created_at >= since, result.c.created_at >= study.c.last_received_at)
            .order_by(result.c.created_at.desc())
            .limit(MOST_TIMES)
        )
        with self._read() as connection:
            return [(listed, listed - last) for listed, last in connection.execute(query)]

    def failures(self, since: datetime) -> list[Failure]:
        """Why studies were not analysable, or were given up; the most frequent reasons first."""
        reason, count = _said("reason"), func.count()
        query = (
            select(result.c.status, reason, count)
            .where(result.c.created_at >= since, result.c.status.not_in(JUDGED))
            .group_by(result.c.status, reason)
            .order_by(count.desc())
            .limit(MOST_REASONS)
        )
        with self._read() as connection:
            return [Failure(Status(status), why, many) for status, why, many in connection.execute(query)]

    def retried(self) -> list[Failure]:
        """Why studies failed that are tried again now."""
        count = func.count()
        query = (
            select(study.c.reason, count)
            .where(study.c.state == StudyState.FAILED, study.c.not_before.is_not(None))
            .group_by(study.c.reason)
            .order_by(count.desc())
            .limit(MOST_REASONS)
        )
        with self._read() as connection:
            return [Failure(Status.FAILED, why, many) for why, many in connection.execute(query)]

    def deliveries(self, since: datetime) -> dict[str, dict[DeliveryState, int]]:
        """What was owed since then, by destination and state."""
        query = (
            select(delivery.c.destination, delivery.c.state, func.count())
            .where(delivery.c.created_at >= since)
            .group_by(delivery.c.destination, delivery.c.state)
            .order_by(delivery.c.destination)
        )
        found: dict[str, dict[DeliveryState, int]] = {}
        with self._read() as connection:
            for destination, state, count in connection.execute(query):
                found.setdefault(destination, {})[DeliveryState(state)] = count
        return found

    def delivery_times(self, since: datetime) -> dict[str, list[timedelta]]:
        """Of the newest deliveries: from being owed until taken, by destination."""
        query = (
            select(delivery.c.destination, delivery.c.created_at, delivery.c.sent_at)
            .where(delivery.c.created_at >= since, delivery.c.sent_at.is_not(None))
            .order_by(delivery.c.created_at.desc())
            .limit(MOST_TIMES)
        )
        found: dict[str, list[timedelta]] = {}
        with self._read() as connection:
            for destination, owed, sent in connection.execute(query):
                found.setdefault(destination, []).append(sent - owed)
        return found

    def answered(self, since: datetime) -> list[Answered]:
        """Answers whose judging began since then."""
        query = (
            select(result, study.c.arrived_at, study.c.last_received_at)
            .join(study)
            .where(result.c.created_at >= since)
            .order_by(result.c.created_at.desc())
            .limit(MOST_TIMES)
        )
        with self._read() as connection:
            return [
                Answered(
                    (row.study_instance_uid, row.revision),
                    Status(row.status),
                    row.arrived_at,
                    row.last_received_at,
                    row.created_at,
                    row.document.get("seconds") or {},
                )
                for row in connection.execute(query)
            ]

    def taken(self, since: datetime) -> list[Taken]:
        """What destinations took since then."""
        query = select(
            delivery.c.delivery_id, delivery.c.destination, delivery.c.created_at, delivery.c.sent_at
        ).where(delivery.c.sent_at >= since)
        with self._read() as connection:
            return [Taken(*row) for row in connection.execute(query)]

    def waiting(self) -> list[Waiting]:
        """What is not finished, by destination and state: few rows of an index, however many are sent."""
        query = (
            select(
                delivery.c.destination,
                delivery.c.state,
                func.count(),
                func.count().filter(delivery.c.attempts > 0),
                func.min(delivery.c.created_at),
            )
            .where(delivery.c.state.in_(UNFINISHED))
            .group_by(delivery.c.state, delivery.c.destination)
        )
        with self._read() as connection:
            return [
                Waiting(name, DeliveryState(state), count, tried, since)
                for name, state, count, tried, since in connection.execute(query)
            ]

    def given_up(self) -> int:
        """Studies that failed for good and were not looked at again."""
        query = select(func.count()).where(
            study.c.state == StudyState.FAILED, study.c.not_before.is_(None), study.c.closed_at.is_(None)
        )
        with self._read() as connection:
            return connection.execute(query).scalar() or 0

    def newest_model(self) -> tuple[str, str]:
        """Name and version of the network that judged last; empty before that."""
        query = (
            select(_said("model"), _said("model_version"))
            .where(result.c.status.in_(JUDGED))
            .order_by(result.c.created_at.desc())
            .limit(1)
        )
        with self._read() as connection:
            name, version = connection.execute(query).first() or ("", "")
            return name or "", version or ""

    def scores(self, since: datetime, until: datetime, model: str, version: str) -> list[Scored]:
        """Of the newest answers of a period by one network, each with one image of the series it judged.

        Of each study only its newest answer counts.
        """
        newer = result.alias()
        is_newest = ~exists().where(
            newer.c.study_instance_uid == result.c.study_instance_uid,
            newer.c.revision > result.c.revision,
            newer.c.status.in_(JUDGED),
        )
        facts = (
            select(instance.c.facts)
            .where(
                instance.c.study_instance_uid == result.c.study_instance_uid,
                instance.c.series_instance_uid == _said("series_instance_uid"),
            )
            .limit(1)
            .scalar_subquery()
        )
        probability = result.c.document["probability"].as_float()
        query = (
            select(probability, facts)
            .where(
                result.c.created_at >= since,
                result.c.created_at < until,
                result.c.status.in_(JUDGED),
                probability.is_not(None),
                func.coalesce(_said("model"), "") == model,
                func.coalesce(_said("model_version"), "") == version,
                is_newest,
            )
            .order_by(result.c.created_at.desc())
            .limit(MOST_SCORES)
        )
        with self._read() as connection:
            return [
                Scored(
                    score,
                    (known or {}).get("scanner", ""),
                    (known or {}).get("convolution_kernel", ""),
                    (known or {}).get("slice_thickness"),
                )
                for score, known in connection.execute(query)
            ]


def _said(name: str) -> ColumnElement[str]:
    """A text of the answer."""
    said: ColumnElement[str] = result.c.document[name].as_string()
    return said
