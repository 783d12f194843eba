"""The list as people read it: by pages, with filters, live; who reads what, and what readers say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    case,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert

from triage.db.tables import NEXT_CHANGE, claim, delivery, policy, saved_view, study, verdict
from triage.db.worklist import Chosen, alone, entries, is_open, key_of, listed, place, place_in, wanted
from triage.domain import Band, Grade, Status, WorklistEntry
from triage.errors import Rejected

Opinion = Literal["agree", "over_called", "under_called", "wrong_organ", "other"]
NEWER_ANSWER = "there is a newer answer than the one that was seen: look at the study again"
Connecting = Callable[[], AbstractContextManager[Connection]]


@dataclass(frozen=True, slots=True)
class Claim:
    """Who reads a study, and until when nobody else should begin to."""

    person: str
    claimed_at: datetime
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a reader said of an answer, beside the figures that the answer and its place had then."""

    study_instance_uid: str
    person: str
    given_at: datetime
    opinion: Opinion
    comment: str = ""
    true_grade: Grade | None = None
    revision: int | None = None
    status: Status | None = None
    probability: float | None = None
    band: Band
    score: float
    model: str | None = None
    model_version: str | None = None
    policy_version: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One study with what readers did. ``key`` is its place in the ordering, to go on from."""

    entry: WorklistEntry
    key: str
    claim: Claim | None
    verdict: Verdict | None
    """The newest."""


@dataclass(frozen=True, slots=True)
class Page:
    """``first_place`` is the number of the first row among all that were chosen; from 1."""

    rows: tuple[Row, ...]
    first_place: int
    more: bool


@dataclass(frozen=True, slots=True)
class Counts:
    """Of open studies."""

    open: int = 0
    overdue: int = 0
    critical: int = 0
    pending: int = 0
    not_analysable: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """``version`` differs whenever anything on the list has changed."""

    version: int
    critical: tuple[str, ...]
    """UIDs of open critical studies that changed."""


class Reading:
    """Everything the page of the list asks of the database. Each public method is one transaction."""

    def __init__(self, read: Connecting, write: Connecting) -> None:
        self._read, self._write = read, write

    # --- the list ------------------------------------------------------------------------------

    def page(
        self,
        now: datetime,
        ordering: str,
        leave_after_days: float,
        chosen: Chosen,
        *,
        after: str | None = None,
        until: str | None = None,
        limit: int,
    ) -> Page:
        """Open studies in reading order, after one key and up to another: at most ``limit``.

        Pages that go on from one another's last key show each study that keeps its place exactly once,
        whatever comes, goes or moves meanwhile. Raises Rejected for a key of another ordering.
        """
        those, here = wanted(now, chosen), place(ordering)
        query = listed(now, ordering, leave_after_days).where(those).limit(limit + 1)
        earlier = select(func.count()).select_from(study).where(is_open(now, leave_after_days), those)
        if after is not None:
            query = query.where(here > place_in(ordering, after))
            earlier = earlier.where(here <= place_in(ordering, after))
        if until is not None:
            query = query.where(here <= place_in(ordering, until))
        with self._read() as connection:
            found = connection.execute(query).mappings().all()
            before = 0 if after is None else connection.execute(earlier).scalar_one()
            rows = _rows(connection, ordering, found[:limit], now)
        return Page(rows, before + 1, len(found) > limit)

    def row(self, study_instance_uid: str, now: datetime, ordering: str) -> Row | None:
        """One study, open or closed."""
        query = select(study).where(study.c.study_instance_uid == study_instance_uid)
        with self._read() as connection:
            found = _rows(connection, ordering, connection.execute(query).mappings().all(), now)
        return found[0] if found else None

    def beside(self, found: Sequence[WorklistEntry], now: datetime) -> list[Row]:
        """Studies that were found in another way, with who reads them and what was said of them."""
        uids = [entry.study.study_instance_uid for entry in found]
        with self._read() as connection:
            claims, said = _claims(connection, uids, now), _newest_verdicts(connection, uids)
        return [Row(one, "", claims.get(uid), said.get(uid)) for uid, one in zip(uids, found, strict=True)]

    def counts(self, now: datetime, leave_after_days: float) -> Counts:
        query = select(
            func.count(),
            _how_many(study.c.due_at <= now),
            _how_many(study.c.band == Band.CRITICAL),
            _how_many(study.c.status.is_(None)),
            _how_many(study.c.status == Status.NOT_ANALYSABLE),
            _how_many(study.c.status == Status.FAILED),
        ).where(is_open(now, leave_after_days))
        with self._read() as connection:
            return Counts(*connection.execute(query).one())

    def version(self) -> int:
        """Another one whenever anything on the list has changed."""
        with self._read() as connection:
            return _version(connection)

    def changes(self, since: int, now: datetime, leave_after_days: float) -> Changes:
        """Whether anything changed, and which critical studies did; ``since`` 0 names them all."""
        rank = alone(study.c.strict_rank) if since else study.c.strict_rank  # of late, few have changed
        critical = (
            select(study.c.study_instance_uid)
            .where(
                is_open(now, leave_after_days),
                rank == Band.CRITICAL,
                study.c.changed > since,
            )
            .order_by(study.c.changed, study.c.study_instance_uid)
        )
        with self._read() as connection:
            version = _version(connection)
            if version == since:
                return Changes(version, ())
            return Changes(version, tuple(connection.execute(critical).scalars()))

    # --- who reads what --------------------------------------------------------------------------

    def claim(
        self, study_instance_uid: str, person: str, now: datetime, until: datetime, *, take_over: str = ""
    ) -> Claim | None:
        """Who has the study afterwards: the person, or whoever had it, unless ``take_over`` names just them.

        None when there is no such study; raises Rejected when it is read already.
        """
        with self._write() as connection:
            if not _is_there(connection, study_instance_uid):
                return None
            standing = _claims(connection, [study_instance_uid], now).get(study_instance_uid)
            if standing and standing.person not in (person, take_over):
                return standing
            mine = standing and standing.person == person
            begun = standing.claimed_at if standing and mine else now
            values = {"person": person, "claimed_at": begun, "until": until}
            connection.execute(
                upsert(claim)
                .values(study_instance_uid=study_instance_uid, **values)
                .on_conflict_do_update(index_elements=["study_instance_uid"], set_=values)
            )
            _touch(connection, study_instance_uid)
            return Claim(person, begun, until)

    def reader(self, study_instance_uid: str, now: datetime) -> Claim | None:
        """Who reads the study now."""
        with self._read() as connection:
            return _claims(connection, [study_instance_uid], now).get(study_instance_uid)

    def release(self, study_instance_uid: str, person: str) -> bool:
        """Give the study back; False when the person does not have it."""
        with self._write() as connection:
            gone = connection.execute(
                delete(claim).where(
                    claim.c.study_instance_uid == study_instance_uid, claim.c.person == person
                )
            ).rowcount
            if gone:
                _touch(connection, study_instance_uid)
            return gone > 0

    def mark_read(
        self,
        study_instance_uid: str,
        person: str,
        now: datetime,
        *,
        take_over: str = "",
        revision: int | None = None,
        images: int | None = None,
    ) -> Claim | bool:
        """Take the study off the list; the claim that speaks against it when somebody else reads it.

        ``revision`` (0 without an answer) and ``images`` are those that the reader saw. False when there is
        no such study; raises Rejected when it is read already, or is not any more what the reader saw.
        """
        with self._write() as connection:
            if not _is_there(connection, study_instance_uid):
                return False
            standing = _claims(connection, [study_instance_uid], now).get(study_instance_uid)
            if standing and standing.person not in (person, take_over):
                return standing
            _be_as_seen(connection, study_instance_uid, revision, images)
            connection.execute(delete(claim).where(claim.c.study_instance_uid == study_instance_uid))
            connection.execute(
                update(study)
                .where(study.c.study_instance_uid == study_instance_uid)
                .values(closed_at=now, closed_reason=f"read by {person}")
            )
            return True

    def mark_unread(self, study_instance_uid: str) -> bool:
        """Put a closed study back on the list, at its old place; False when it is not closed."""
        with self._write() as connection:
            return (
                connection.execute(
                    update(study)
                    .where(study.c.study_instance_uid == study_instance_uid, study.c.closed_at.is_not(None))
                    .values(closed_at=None, closed_reason="")
                ).rowcount
                > 0
            )

    # --- what readers say ------------------------------------------------------------------------

    def give_verdict(
        self,
        study_instance_uid: str,
        person: str,
        now: datetime,
        opinion: Opinion,
        *,
        comment: str = "",
        true_grade: Grade | None = None,
        revision: int | None = None,
    ) -> Verdict | None:
        """Keep what a reader says, with the answer and the policy it is said of; None: no such study.

        Raises Rejected while there is no answer, or when ``revision``, the one that the reader saw, is not
        the newest. Nothing is overwritten: of a reader's verdicts on one revision the newest counts.
        """
        query = select(study).where(study.c.study_instance_uid == study_instance_uid)
        with self._write() as connection:
            found = entries(connection, connection.execute(query).mappings().all())
            if not found:
                return None
            answer, place = found[0].result, found[0].priority
            if answer is None:
                raise Rejected("there is no answer yet that a verdict could be on")
            if revision not in (None, answer.revision):
                raise Rejected(NEWER_ANSWER)
            given = Verdict(
                study_instance_uid=study_instance_uid,
                person=person,
                given_at=now,
                opinion=opinion,
                comment=comment,
                true_grade=true_grade,
                revision=answer.revision,
                status=answer.status,
                probability=answer.probability,
                band=place.band,
                score=place.score,
                model=answer.model,
                model_version=answer.model_version,
                policy_version=connection.execute(select(func.max(policy.c.version))).scalar(),
            )
            connection.execute(insert(verdict).values(**_verdict_values(given)))
            _touch(connection, study_instance_uid)
            return given

    def verdicts(self, study_instance_uid: str) -> list[Verdict]:
        """The newest first."""
        query = (
            select(verdict)
            .where(verdict.c.study_instance_uid == study_instance_uid)
            .order_by(verdict.c.verdict_id.desc())
        )
        with self._read() as connection:
            return [_verdict_of(row) for row in connection.execute(query).mappings()]

    # --- views -----------------------------------------------------------------------------------

    def views(self, person: str) -> dict[str, str]:
        """The person's saved views: name → query."""
        query = (
            select(saved_view.c.name, saved_view.c.query)
            .where(saved_view.c.person == person)
            .order_by(saved_view.c.name)
        )
        with self._read() as connection:
            return {row.name: row.query for row in connection.execute(query)}

    def save_view(self, person: str, name: str, query: str) -> None:
        """Keep a view under a name; an earlier one of this name is replaced."""
        with self._write() as connection:
            connection.execute(
                upsert(saved_view)
                .values(person=person, name=name, query=query)
                .on_conflict_do_update(index_elements=["person", "name"], set_={"query": query})
            )

    def forget_view(self, person: str, name: str) -> bool:
        """False when there is none of this name."""
        with self._write() as connection:
            mine = (saved_view.c.person == person) & (saved_view.c.name == name)
            return connection.execute(delete(saved_view).where(mine)).rowcount > 0


def _how_many(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


# --- rows -----------------------------------------------------------------------------------------


def _rows(connection: Connection, ordering: str, found: Any, now: datetime) -> tuple[Row, ...]:
    """Four more queries for all of them."""
    uids = [row["study_instance_uid"] for row in found]
    claims, said = _claims(connection, uids, now), _newest_verdicts(connection, uids)
    return tuple(
        Row(entry, key_of(ordering, row), claims.get(uid), said.get(uid))
        for uid, row, entry in zip(uids, found, entries(connection, found), strict=True)
    )


def _claims(connection: Connection, uids: list[str], now: datetime) -> dict[str, Claim]:
    """Those that have not run out."""
    query = select(claim).where(claim.c.study_instance_uid.in_(uids), claim.c.until > now)
    return {
        row["study_instance_uid"]: Claim(row["person"], row["claimed_at"], row["until"])
        for row in connection.execute(query).mappings()
    }


def _newest_verdicts(connection: Connection, uids: list[str]) -> dict[str, Verdict]:
    query = select(verdict).where(verdict.c.study_instance_uid.in_(uids)).order_by(verdict.c.verdict_id)
    return {row["study_instance_uid"]: _verdict_of(row) for row in connection.execute(query).mappings()}


def _verdict_values(given: Verdict) -> dict[str, Any]:
    return {name: getattr(given, name) for name in Verdict.__slots__}


def _verdict_of(row: RowMapping) -> Verdict:
    values = {name: row[name] for name in Verdict.__slots__}
    grade, status = values["true_grade"], values["status"]
    values["true_grade"] = Grade(grade) if grade else None
    values["status"] = Status(status) if status else None
    return Verdict(**{**values, "band": Band(row["band"])})


def _version(connection: Connection) -> int:
    newest = (connection.execute(select(func.max(table.c.changed))).scalar() for table in (study, delivery))
    return max(number or 0 for number in newest)


def _is_there(connection: Connection, uid: str) -> bool:
    """Raises Rejected when it is closed."""
    query = select(study.c.closed_at, study.c.closed_reason).where(study.c.study_instance_uid == uid)
    row = connection.execute(query).first()
    if row is not None and row.closed_at is not None:
        raise Rejected(f"this study is off the list: {row.closed_reason or 'closed'}")
    return row is not None


def _be_as_seen(connection: Connection, uid: str, revision: int | None, images: int | None) -> None:
    query = select(study).where(study.c.study_instance_uid == uid)
    (found,) = entries(connection, connection.execute(query).mappings().all())
    if images not in (None, found.images):
        raise Rejected("images have come that were not seen: look at the study again")
    if revision not in (None, found.result.revision if found.result else 0):
        raise Rejected(NEWER_ANSWER)


def _touch(connection: Connection, uid: str) -> None:
    """What is shown of the study has changed, though nothing of its own."""
    connection.execute(update(study).where(study.c.study_instance_uid == uid).values(changed=NEXT_CHANGE))
