"""What an arriving instance changes: its own row, and the study that it opens, completes or reopens."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Boolean, Connection, RowMapping, bindparam, exists, insert, or_, select, update

from triage.db import orders, records
from triage.db.orders import Pending
from triage.db.prepared import Prepared
from triage.db.tables import instance, study
from triage.domain import Instance, StudyState

IDENTITY = ("patient_id", "patient_name", "accession_number", "study_date", "study_description")
SAID = ("scanner", *(name for name in IDENTITY if name != "accession_number"))
CONCLUDED = (StudyState.ANALYZED, StudyState.REJECTED, StudyState.FAILED)
ANEW: dict[str, Any] = {
    "state": StudyState.RECEIVING,
    "attempts": 0,
    "not_before": None,
    "completeness": None,
    "lease_owner": None,
    "lease_until": None,
    "closed_at": None,
    "closed_reason": "",
    "forgotten": False,
}
"""What begins again when a study is looked at again, for new images or on request."""
CONFLICT_NOTE = "an instance arrived twice with different content; the first one is judged"
OTHER_PATIENT_NOTE = "images of another patient ID came with this study's UID"

AGED = timedelta(hours=1)
"""An image on record for so long that comes again is as good as new to retention."""

KNOWN, KNOWN_SINCE = "known_digest", "known_since"
BEFORE = (
    select(study, instance.c.digest.label(KNOWN), instance.c.received_at.label(KNOWN_SINCE))
    .outerjoin(
        instance,
        (instance.c.study_instance_uid == study.c.study_instance_uid)
        & (instance.c.sop_instance_uid == bindparam("sop_instance_uid")),
    )
    .where(study.c.study_instance_uid == bindparam("uid"))
)
"""The study; of the instance, where it is on record, the digest and when it came."""

# Nearly every image is one more of a study that is being received: two statements, and nothing is read.
KEEP = Prepared(insert(instance))
ONE_MORE = Prepared(
    update(study)
    .where(
        study.c.study_instance_uid == bindparam("study_instance_uid"),
        study.c.accession_number == bindparam("accession_number"),  # another one may have a STAT order
        study.c.images_deleted_at.is_(None),
        *(or_(study.c[name] == bindparam(name), bindparam(name) == "") for name in SAID),
        or_(study.c.stat, bindparam("stat", type_=Boolean()).is_(False)),
        *(study.c[name] == value for name, value in {**ANEW, "reason": ""}.items()),
        ~exists().where(
            instance.c.study_instance_uid == bindparam("study_instance_uid"),
            instance.c.sop_instance_uid == bindparam("sop_instance_uid"),
        ),
    )
    .values(last_received_at=bindparam("received_at"))
)
"""Says that an image came, of a study of which it says nothing new."""


class DeletedNow(Exception):
    """An image was in the spool, was taken for the same as ever, and is deleted before that is on record."""


class Arrival(NamedTuple):
    """An instance that came; ``pending`` gives the place of a study that nobody has judged yet."""

    received: Instance
    now: datetime
    judgeable: bool
    stat: bool
    pending: Pending


def register(connection: Connection, arrival: Arrival) -> None:
    """Put the instance on record; the same one again changes nothing, other bytes are noted."""
    received, stat, judgeable = arrival.received, arrival.stat, arrival.judgeable
    values = {**_row(arrival), **_identity(received, judgeable), "stat": stat}
    if judgeable and ONE_MORE.run(connection, values):
        KEEP.run(connection, values)
    else:
        weigh(connection, arrival)


def weigh(connection: Connection, arrival: Arrival) -> None:
    """The same for any image, also one that comes again, or says what its study did not know."""
    received, now, judgeable, stat, pending = arrival
    uid = received.study_instance_uid
    found = connection.execute(BEFORE, {"uid": uid, "sop_instance_uid": received.sop_instance_uid})
    before = found.mappings().first()
    if before is not None and (deleted_at := before["images_deleted_at"]) is not None:
        now = max(now, deleted_at + timedelta(microseconds=1))  # it may have waited while they were deleted
        _update(connection, uid, images_back=True)
    if before is not None and before[KNOWN] is not None:
        _again(connection, before, received, now)
        return
    if before is None or before["accession_number"] != received.accession_number:  # else the order was told
        stat = stat or orders.is_stat(connection, received.accession_number)
    if before is None:
        _open(connection, received, _identity(received, judgeable), now, stat, pending)
    else:
        _complete(connection, before, _identity(received, judgeable), stat, pending)
    KEEP.run(connection, _row(arrival._replace(now=now)))
    if judgeable and before is not None:
        _reopen(connection, before, now, pending)


def _row(arrival: Arrival) -> dict[str, Any]:
    values = records.instance_values(arrival.received)
    return {**values, "received_at": arrival.now, "judgeable": arrival.judgeable}


def _again(connection: Connection, before: RowMapping, received: Instance, now: datetime) -> None:
    """It says nothing new of its study; after long, it stays as long as if it came for the first time."""
    uid, deleted_at = received.study_instance_uid, before["images_deleted_at"]
    if before[KNOWN] != received.digest:
        add_note(connection, uid, CONFLICT_NOTE)
    if deleted_at is None and before[KNOWN_SINCE] > now - AGED:
        return
    if not received.path.exists():
        raise DeletedNow(received.sop_instance_uid)
    of_study = instance.c.study_instance_uid == uid
    own = instance.c.sop_instance_uid == received.sop_instance_uid
    connection.execute(update(instance).where(of_study, own).values(received_at=now))
    if deleted_at is not None:
        still_gone = select(instance.c.path).where(of_study, instance.c.received_at <= deleted_at)
        if connection.execute(still_gone.limit(1)).first() is None:
            _update(connection, uid, images_deleted_at=None, images_back=False)


def add_note(connection: Connection, uid: str, note: str) -> None:
    """Say something about the study on the list, once."""
    before = _study(connection, uid)
    if before is not None and note not in before["notes"]:
        _update(connection, uid, notes=[*before["notes"], note])


def _identity(received: Instance, judgeable: bool) -> dict[str, str]:
    """What an image says of its study; only a judgeable one was surely made by the study's scanner."""
    scanner = {"scanner": received.scanner} if judgeable else {}
    return {name: getattr(received, name) for name in IDENTITY} | scanner


def _open(
    connection: Connection,
    received: Instance,
    known: dict[str, str],
    now: datetime,
    stat: bool,
    pending: Pending,
) -> None:
    connection.execute(
        insert(study).values(
            study_instance_uid=received.study_instance_uid,
            state=StudyState.RECEIVING,
            arrived_at=now,
            last_received_at=now,
            stat=stat,
            **known,
            **records.priority_values(pending(now, stat)),
        )
    )


def _complete(
    connection: Connection, before: RowMapping, known: dict[str, str], stat: bool, pending: Pending
) -> None:
    """A dose report may come first and know less: fill what is empty; one STAT image makes the study STAT."""
    values: dict[str, Any] = {name: value for name, value in known.items() if value and not before[name]}
    if stat and not before["stat"]:
        values["stat"] = True
        due_at = pending(before["arrived_at"], True).due_at
        values |= records.priority_values(records.priority_of(before).ordered_stat(due_at))
    if values:
        _update(connection, before["study_instance_uid"], **values)
    if known["patient_id"] and before["patient_id"] not in ("", known["patient_id"]):
        add_note(connection, before["study_instance_uid"], OTHER_PATIENT_NOTE)


def _reopen(connection: Connection, before: RowMapping, now: datetime, pending: Pending) -> None:
    """New content: what was concluded is out of date; a closed study comes back to the list."""
    values: dict[str, Any] = {}
    if before["state"] in CONCLUDED:
        values = place_again(before, pending, "new images came")
    _update(
        connection,
        before["study_instance_uid"],
        **{**ANEW, **values, "last_received_at": now, "reason": ""},
    )


def place_again(before: RowMapping, pending: Pending, why: str) -> dict[str, Any]:
    """A study that is looked at again keeps its place, or moves up to where those wait that nobody has
    judged.
    """
    place = pending(before["arrived_at"], before["stat"])
    place = replace(place, reason=f"{why}, {place.reason}")
    return records.priority_values(records.priority_of(before).or_sooner(place))


def _study(connection: Connection, uid: str) -> RowMapping | None:
    return connection.execute(select(study).where(study.c.study_instance_uid == uid)).mappings().first()


def _update(connection: Connection, uid: str, **values: Any) -> None:
    connection.execute(update(study).where(study.c.study_instance_uid == uid).values(**values))
