"""Every query of the daemon. Each public method is one transaction; a busy or lost database is Retryable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from triage.config import PriorityPolicy
from triage.db import commitments, copies, intake, orders, policies, records, studies
from triage.db.audit import Trail, append
from triage.db.commitments import Again
from triage.db.engine import connect, migrate, translated
from triage.db.intake import Arrival
from triage.db.monitoring import Monitoring
from triage.db.orders import Pending
from triage.db.people import People
from triage.db.policies import Opinion, Placed, PolicyVersion
from triage.db.reading import Reading
from triage.db.roles import Roles
from triage.db.tables import delivery, instance, rest, result, study
from triage.db.uploads import Uploads, is_whole
from triage.db.worklist import (
    ON_THE_LIST,
    ORDERINGS,
    alone,
    entries,
    is_open,
    listed,
    matches,
    place,
    place_of,
)
from triage.domain import (
    Delivery,
    DeliveryState,
    Instance,
    News,
    Owed,
    Priority,
    Reference,
    Result,
    Standing,
    Study,
    StudyState,
    WorklistEntry,
)
from triage.errors import Retryable
from triage.together import Together

PIECE = 5000
"""Studies that are read at once where all open ones are gone through."""
AT_ONCE = 100
"""Studies whose images are deleted in one step."""
UNSENT = (DeliveryState.PENDING, DeliveryState.GIVEN_UP)
"""What a destination has not taken."""

WAITED_FOR = timedelta(minutes=10)
"""What is tried again within this holds up what follows it of its study; what takes longer does not: a report
is worth more than its order."""


CLOCKS_DIFFER = timedelta(seconds=10)
"""By which the times of two processes may differ; more is a clock that was put right."""


class Database:
    """The state of the daemon. Safe to share between threads; every process opens its own."""

    def __init__(self, url: str, *, sync: bool = True) -> None:
        """``sync`` False: a power cut may lose what was committed; only to measure."""
        self._engine = connect(url, sync=sync)
        self._writing = self._engine.execution_options(writes=True)
        self._arrivals = Together(self._register)
        self._arriving: Connection | None = None
        self.reading = Reading(self._read, self._write)
        self.people = People(self._read, self._write)
        self.trail = Trail(self._read, self._write)
        self.monitoring = Monitoring(self._read)
        self.roles = Roles(self._read, self._write)
        self.uploads = Uploads(self._read, self._write)

    def migrate(self) -> None:
        migrate(self._engine)

    def close(self) -> None:
        if self._arriving is not None and not self._arriving.in_transaction():
            self._arriving.close()  # else it would roll back what another thread is just recording
        self._engine.dispose()

    # --- back-up -----------------------------------------------------------------------------

    def copy(self, path: Path) -> None:
        """The whole database as of one moment, in a file that is nobody else's, while others write."""
        copies.copy(self._engine, path)

    def paths(self) -> Iterator[Path]:
        """Every file that the rows name, but images that were deleted on purpose."""
        with self._read() as connection:
            yield from copies.paths(connection)

    def settle_copy(self, old: Path, new: Path, *, audit_file: bool) -> None:
        """A copy becomes the database: the spool moved from ``old`` to ``new``, and no role is alive."""
        with self._write() as connection:
            if old != new:
                copies.move(connection, old, new)
            copies.forget_processes(connection, audit_file=audit_file)

    # --- receiving ---------------------------------------------------------------------------

    def register(
        self, received: Instance, now: datetime, *, judgeable: bool, stat: bool, pending: Pending
    ) -> None:
        """Remember an instance. Only a new judgeable one (a CT image) reopens its study.

        ``pending`` gives the place of a study that nobody has judged yet. What several threads register at
        the same time is one transaction.
        """
        try:
            self._arrivals.do(Arrival(received, now, judgeable, stat, pending))
        except intake.DeletedNow as gone:  # not Retryable before: all who came with it would be refused
            raise Retryable(f"SOP instance {gone} is being deleted; send it again") from gone

    def _register(self, arrivals: Sequence[Arrival]) -> None:
        """One thread at a time; its connection is kept, for to borrow one takes as long as to commit."""
        with translated():
            self._arriving = self._arriving or self._writing.connect()
            with self._arriving.begin():
                for arrival in arrivals:
                    intake.register(self._arriving, arrival)

    def sop_instance_uids(self, study_instance_uid: str) -> set[str]:
        """What is on record of a study, by SOP Instance UID."""
        query = select(instance.c.sop_instance_uid).where(instance.c.study_instance_uid == study_instance_uid)
        with self._read() as connection:
            return set(connection.execute(query).scalars())

    def note_conflict(self, received: Instance) -> None:
        """Other bytes came under a known SOP Instance UID: say so on the worklist."""
        with self._write() as connection:
            intake.add_note(connection, received.study_instance_uid, intake.CONFLICT_NOTE)

    # --- assembling --------------------------------------------------------------------------

    def quiet_study(
        self, last_received_before: datetime, compared_unless_before: datetime | None = None
    ) -> Study | None:
        """The study that has been quiet longest, or None; one that was uploaded whole need not be quiet.

        With ``compared_unless_before``, only one that was compared with the archive, or whose last image
        came before then.
        """
        ready = (study.c.last_received_at <= last_received_before) | is_whole()
        if compared_unless_before is not None:
            compared = study.c.completeness.is_not(None) & study.c.not_before.is_(None)
            ready &= compared | (study.c.last_received_at <= compared_unless_before)
        return self._oldest(ready)

    def study_to_compare(self, last_received_before: datetime, now: datetime) -> Study | None:
        """The study that has been quiet longest of those to be compared with the archive (again), or None."""
        asked_again = study.c.not_before <= now
        unasked = study.c.completeness.is_(None)
        quiet = (study.c.last_received_at <= last_received_before) | is_whole()
        return self._oldest(quiet & (unasked | asked_again))

    def _oldest(self, chosen: ColumnElement[bool]) -> Study | None:
        query = (
            select(study)
            .where(study.c.state == StudyState.RECEIVING, chosen)
            .order_by(study.c.last_received_at)
            .limit(1)
        )
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
            return records.study_of(row) if row else None

    def mark_compared(self, seen: Study, completeness: str, ask_again_at: datetime | None = None) -> bool:
        """Remember what the archive said, unless an image came in the meantime.

        With ``ask_again_at`` the study waits for what is missing.
        """
        with self._write() as connection:
            return _transition(
                connection, seen, seen.state, completeness=completeness, not_before=ask_again_at
            )

    def restart_quiet_periods(self, now: datetime) -> None:
        """After a pause: nothing could arrive meanwhile, so that silence says nothing of completeness."""
        with self._write() as connection:
            connection.execute(
                update(study)
                .where(study.c.state == StudyState.RECEIVING)
                .values(last_received_at=now, forgotten=False)
            )

    def heed_clock(self, now: datetime, lease_seconds: float) -> bool:
        """Bring back what lies in the future because the clock was ahead: nothing waits for that day to come.

        A study that came then came now, and its place in the list moves with it. False when all is well.
        """
        ahead, lease = now + CLOCKS_DIFFER, timedelta(seconds=lease_seconds)
        late_lease = study.c.lease_until > ahead + lease
        query = select(study).where(
            (study.c.last_received_at > ahead) | (study.c.arrived_at > ahead) | late_lease
        )
        with self._write() as connection:
            found = connection.execute(query).mappings().all()
            for row in found:
                too_late = max(row["arrived_at"] - now, timedelta())
                connection.execute(
                    update(study)
                    .where(study.c.study_instance_uid == row["study_instance_uid"])
                    .values(
                        arrived_at=row["arrived_at"] - too_late,
                        due_at=row["due_at"] - too_late,
                        last_received_at=min(row["last_received_at"], now),
                        lease_until=row["lease_until"] and min(row["lease_until"], now + lease),
                    )
                )
            return bool(found)

    def instances(self, study_instance_uid: str) -> list[Instance]:
        """All instances of the study, judgeable or not, in the order of arrival."""
        query = (
            select(instance)
            .where(instance.c.study_instance_uid == study_instance_uid)
            .order_by(instance.c.received_at, instance.c.sop_instance_uid)
        )
        with self._read() as connection:
            return [records.instance_of(row) for row in connection.execute(query).mappings()]

    def mark_ready(self, seen: Study) -> bool:
        """RECEIVING → READY, unless a slice came in the meantime."""
        with self._write() as connection:
            return _transition(connection, seen, StudyState.READY, attempts=0, not_before=None, reason="")

    def mark_rejected(
        self, seen: Study, answer: Result, priority: Priority, now: datetime, owed: Sequence[Owed] = ()
    ) -> bool:
        """→ REJECTED with its reason as a new revision and outbox rows, unless a slice came meanwhile."""
        with self._write() as connection:
            return _settle(
                connection, seen, StudyState.REJECTED, answer, priority, owed, now, reason=answer.reason
            )

    # --- analyzing ---------------------------------------------------------------------------

    def claim(self, owner: str, now: datetime, lease_seconds: float) -> Study | None:
        """READY (or FAILED and due for another try) → ANALYZING; the most urgent first."""
        due = or_(study.c.not_before.is_(None), study.c.not_before <= now)
        waiting = or_(
            study.c.state == StudyState.READY,
            (study.c.state == StudyState.FAILED) & study.c.not_before.is_not(None),
        )
        query = select(study).where(waiting, due).order_by(study.c.due_at, study.c.arrived_at).limit(1)
        with self._write() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            connection.execute(
                update(study)
                .where(study.c.study_instance_uid == row["study_instance_uid"])
                .values(
                    state=StudyState.ANALYZING,
                    attempts=row["attempts"] + 1,
                    lease_owner=owner,
                    lease_until=now + timedelta(seconds=lease_seconds),
                    not_before=None,
                )
            )
            return dataclasses.replace(
                records.study_of(row), state=StudyState.ANALYZING, attempts=row["attempts"] + 1
            )

    def release_leases(self, now: datetime, owner: str | None = None) -> int:
        """ANALYZING → READY where the lease ran out, or where a dead process of ``owner`` held it."""
        lost: ColumnElement[bool] = study.c.lease_until < now
        if owner is not None:
            lost = or_(lost, study.c.lease_owner == owner)
        with self._write() as connection:
            return connection.execute(
                update(study)
                .where(study.c.state == StudyState.ANALYZING, lost)
                .values(state=StudyState.READY, lease_owner=None, lease_until=None)
            ).rowcount

    def finish(
        self,
        seen: Study,
        answer: Result,
        owed: Sequence[Owed],
        priority: Priority,
        now: datetime,
    ) -> bool:
        """ANALYZING → ANALYZED; result rows and outbox rows in one transaction.

        False, and nothing written, when late slices reopened the study meanwhile.
        """
        with self._write() as connection:
            return _settle(connection, seen, StudyState.ANALYZED, answer, priority, owed, now, reason="")

    def mark_failed(
        self, seen: Study, reason: str, priority: Priority, retry_at: datetime, attempts: int
    ) -> bool:
        """→ FAILED, to be tried again at ``retry_at``; ``attempts`` so far that count."""
        with self._write() as connection:
            return _transition(
                connection,
                seen,
                StudyState.FAILED,
                reason=reason,
                attempts=attempts,
                not_before=retry_at,
                **orders.place_values(connection, seen, priority),
            )

    def mark_given_up(
        self, seen: Study, answer: Result, priority: Priority, now: datetime, owed: Sequence[Owed] = ()
    ) -> bool:
        """→ FAILED for good, with its reason as a new revision and outbox rows, unless a slice came."""
        with self._write() as connection:
            return _settle(
                connection, seen, StudyState.FAILED, answer, priority, owed, now, reason=answer.reason
            )

    # --- the spool ---------------------------------------------------------------------------

    def images_to_delete(self, received_before: datetime) -> list[str]:
        """Some studies that are concluded and wholly delivered, and got no image since then."""
        query = select(study.c.study_instance_uid).where(_has_images_to_delete(received_before))
        with self._read() as connection:
            return list(connection.execute(query.limit(AT_ONCE)).scalars())

    def mark_images_deleted(
        self, uid: str, received_before: datetime, now: datetime, put_aside: Callable[[set[Path]], None]
    ) -> bool:
        """The images of one of these studies are gone once ``put_aside`` has put them aside.

        It gets the files on record, and is to be quick: nothing can be written meanwhile. False where the
        study is none of these any more.
        """
        own = study.c.study_instance_uid == uid
        still = select(study.c.state).where(own, _has_images_to_delete(received_before))
        with self._write() as connection:
            if connection.execute(still).first() is None:
                return False
            paths = select(instance.c.path).where(instance.c.study_instance_uid == uid)
            put_aside({Path(path) for path in connection.execute(paths).scalars()})
            connection.execute(update(study).where(own).values(images_deleted_at=now, images_back=False))
        return True

    # --- delivering --------------------------------------------------------------------------

    def due_deliveries(self, destination: str, now: datetime, limit: int = 100) -> list[Delivery]:
        """What this destination is owed now, oldest first; nothing while it wants to be left alone.

        Of one study the order is kept: what follows something that is tried again soon waits for it.
        """
        resting = exists().where(rest.c.destination == destination, rest.c.until > now)
        earlier = delivery.alias()
        held = exists().where(
            earlier.c.destination == destination,
            earlier.c.study_instance_uid == delivery.c.study_instance_uid,
            earlier.c.delivery_id < delivery.c.delivery_id,
            earlier.c.state == DeliveryState.PENDING,
            earlier.c.next_attempt_at > now,
            earlier.c.next_attempt_at <= now + WAITED_FOR,
        )
        query = (
            select(delivery)
            .where(
                delivery.c.destination == destination,
                delivery.c.state == DeliveryState.PENDING,
                delivery.c.next_attempt_at <= now,
                ~resting,
                ~held,
            )
            .order_by(delivery.c.delivery_id)
            .limit(limit)
        )
        with self._read() as connection:
            return [records.delivery_of(row) for row in connection.execute(query).mappings()]

    def restart_waits(self, now: datetime) -> None:
        """After a pause: what was due and tried by nobody meanwhile is given up that much later."""
        due = delivery.c.state.in_((DeliveryState.PENDING, DeliveryState.COMMITTING))
        query = select(delivery).where(due, delivery.c.next_attempt_at < now)
        with self._write() as connection:
            for row in connection.execute(query).mappings().all():
                one = records.delivery_of(row)
                since = one.created_at if one.state is DeliveryState.PENDING else one.uncommitted_since
                connection.execute(
                    update(delivery)
                    .where(delivery.c.delivery_id == one.delivery_id)
                    .values(created_at=since + (now - row["next_attempt_at"]), next_attempt_at=now)
                )

    def destinations_owed(self) -> set[str]:
        """Names of all destinations that something waits for."""
        query = select(delivery.c.destination).where(delivery.c.state == DeliveryState.PENDING).distinct()
        with self._read() as connection:
            return set(connection.execute(query).scalars())

    def mark_sent(self, delivery_id: int, now: datetime, *, commit: bool = False) -> None:
        """The destination has it; with ``commit`` it is to be asked, from now on, to keep it."""
        state = DeliveryState.COMMITTING if commit else DeliveryState.SENT
        asked = {"transaction_uid": None, "next_attempt_at": now, "away": False}
        self._set_delivery(delivery_id, state=state, sent_at=now, last_error="", **asked)

    def postpone(
        self, delivery_id: int, error: str, next_attempt_at: datetime, *, away: bool = False
    ) -> None:
        """Try again then; or sooner, where the destination was ``away`` and is back."""
        self._set_delivery(delivery_id, last_error=error, next_attempt_at=next_attempt_at, away=away)

    def wake(self, destination: str, now: datetime) -> None:
        """The destination is back: what waits only because it was away is due now."""
        waiting = (delivery.c.destination == destination) & (delivery.c.state == DeliveryState.PENDING)
        with self._write() as connection:
            connection.execute(
                update(delivery).where(waiting, delivery.c.away).values(next_attempt_at=now, away=False)
            )

    def rest(self, destination: str, until: datetime) -> None:
        """The destination wants to be left alone: nothing is due before then, also what is yet to come."""
        with self._write() as connection:
            connection.execute(delete(rest).where(rest.c.destination == destination))
            connection.execute(insert(rest).values(destination=destination, until=until))

    def give_up(self, delivery_id: int, error: str) -> None:
        self._set_delivery(delivery_id, state=DeliveryState.GIVEN_UP, last_error=error)

    def _set_delivery(self, delivery_id: int, **values: Any) -> None:
        with self._write() as connection:
            connection.execute(
                update(delivery)
                .where(delivery.c.delivery_id == delivery_id, delivery.c.state == DeliveryState.PENDING)
                .values(attempts=delivery.c.attempts + 1, **values)
            )

    def answer(self, owed: Delivery) -> tuple[Study, Priority, Result]:
        """The study, its place, and the revision of its answer that is owed."""
        query = (
            select(study, result.c.document)
            .join(result, result.c.study_instance_uid == study.c.study_instance_uid)
            .where(study.c.study_instance_uid == owed.study_instance_uid, result.c.revision == owed.revision)
        )
        with self._read() as connection:
            row = connection.execute(query).mappings().one()
            return records.study_of(row), records.priority_of(row), records.result_of(row["document"])

    def undelivered(self) -> list[Delivery]:
        """What waits to be sent or was given up, oldest first."""
        return self._deliveries(delivery.c.state.in_(UNSENT))

    def resend(
        self,
        destination: str,
        study_instance_uid: str | None,
        now: datetime,
        messages: Sequence[str] = (),
    ) -> int:
        """Owe this destination anew what it was not sent, of one study or of all; how many they are.

        ``messages`` are audit messages, written in the same transaction.
        """
        chosen = (delivery.c.destination == destination) & delivery.c.state.in_(UNSENT)
        if study_instance_uid is not None:
            chosen &= delivery.c.study_instance_uid == study_instance_uid
        with self._write() as connection:
            connection.execute(delete(rest).where(rest.c.destination == destination))
            append(connection, messages)
            return connection.execute(update(delivery).where(chosen).values(**_anew(now))).rowcount

    # --- storage commitment ------------------------------------------------------------------

    def due_commitment(self, destination: str, now: datetime) -> list[Delivery]:
        """What this destination has to be asked now of one study: all with the same transaction, or none."""
        with self._read() as connection:
            return commitments.due(connection, destination, now)

    def begin_commitment(self, asked: Sequence[Delivery], transaction_uid: str, answer_by: datetime) -> None:
        """Before the request is sent: whatever happens then, its answer is known, or looked for."""
        with self._write() as connection:
            commitments.begin(connection, asked, transaction_uid, answer_by)

    def put_off_commitment(self, transaction_uid: str, error: str, again: Again, *, ask_anew: bool) -> None:
        """The destination could not be asked. With ``ask_anew`` it surely knows of no such transaction."""
        with self._write() as connection:
            commitments.put_off(connection, transaction_uid, error, again, ask_anew=ask_anew)

    def destination_of_commitment(self, transaction_uid: str) -> str | None:
        """Who was asked in this transaction; None when nobody was."""
        with self._read() as connection:
            return commitments.destination_of(connection, transaction_uid)

    def settle_commitment(
        self,
        transaction_uid: str,
        committed: Collection[Reference],
        failed: Mapping[Reference, str],
        again: Again,
        now: datetime,
        states: Collection[DeliveryState] = commitments.ANSWERABLE,
    ) -> list[Delivery]:
        """Mark what was asked for in this transaction: committed, or to be sent again. Gives what changed."""
        with self._write() as connection:
            return commitments.settle(connection, transaction_uid, committed, failed, again, now, states)

    def uncommitted(self) -> list[Delivery]:
        """What was taken and not committed, or not yet, oldest first."""
        return self._deliveries(delivery.c.state.in_(commitments.UNCOMMITTED))

    def ask_anew(self, destination: str, study_instance_uid: str | None, now: datetime) -> int:
        """Ask this destination for its commitment again, for one study or for all; for how many objects."""
        with self._write() as connection:
            return commitments.ask_anew(connection, destination, study_instance_uid, now)

    def waive_commitments(self, all_but: Collection[str]) -> None:
        """Ask no more of destinations that are asked no longer: what they took is sent, and that is all."""
        with self._write() as connection:
            commitments.waive(connection, all_but)

    # --- what people do ----------------------------------------------------------------------

    def requeue(self, study_instance_uid: str, now: datetime, pending: Pending) -> bool:
        """Assemble and judge the study again, and try its undelivered objects anew."""
        chosen = study.c.study_instance_uid == study_instance_uid
        with self._write() as connection:
            before = connection.execute(select(study).where(chosen)).mappings().first()
            if before is None:
                return False
            place = intake.place_again(before, pending, "looked at again on request")
            connection.execute(
                update(study).where(chosen).values(**intake.ANEW, **place, last_received_at=now)
            )
            connection.execute(
                update(delivery)
                .where(delivery.c.study_instance_uid == study_instance_uid, delivery.c.state.in_(UNSENT))
                .values(**_anew(now))
            )
            return True

    def close_study(self, study_instance_uid: str, reason: str, now: datetime) -> bool:
        """Take the study off the list (it was read, or need not be); it stays searchable."""
        with self._write() as connection:
            return (
                connection.execute(
                    update(study)
                    .where(study.c.study_instance_uid == study_instance_uid)
                    .values(closed_at=now, closed_reason=reason)
                ).rowcount
                > 0
            )

    # --- what other systems say --------------------------------------------------------------

    def hear(self, news: Sequence[News], pending: Pending, now: datetime) -> list[tuple[str, str]]:
        """Store all that one message tells, or nothing of it; what changed, as (study's UID, its change).

        An order: remember whether it is STAT, for images that come, and move up the studies that are here;
        what is STAT here stays so. A report: take the studies off the list because they were read. Raises
        Rejected when the patient's IDs are known and a study's is not among them.
        """
        with self._write() as connection:
            return [change for told in news for change in orders.hear(connection, told, pending, now)]

    def study_to_ask_for(self, now: datetime, leave_after_days: float) -> Study | None:
        """An open study that is not STAT and whose order the RIS was not asked for: the newest that was not
        tried, else the one whose last try is longest ago.
        """
        query = (
            select(study)
            .where(
                is_open(now, leave_after_days),
                study.c.stat.is_(False),
                study.c.accession_number != "",
                study.c.priority_asked_at.is_(None),
            )
            .order_by(study.c.priority_tried_at.asc().nulls_first(), study.c.arrived_at.desc())
            .limit(1)
        )
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
            return records.study_of(row) if row else None

    def mark_asked_for(self, study_instance_uid: str, now: datetime, *, answered: bool) -> None:
        """The RIS has answered for this study, or has not: then it is asked again after the others."""
        column = study.c.priority_asked_at if answered else study.c.priority_tried_at
        with self._write() as connection:
            connection.execute(
                update(study).where(study.c.study_instance_uid == study_instance_uid).values({column: now})
            )

    # --- reading -----------------------------------------------------------------------------

    def worklist(
        self, now: datetime, ordering: str, leave_after_days: float, limit: int | None = None
    ) -> list[WorklistEntry]:
        """Open studies in reading order; see README, "How the list is ordered"."""
        query = listed(now, ordering, leave_after_days).limit(limit)
        with self._read() as connection:
            return entries(connection, connection.execute(query).mappings().all())

    def forget(self, now: datetime, leave_after_days: float) -> bool:
        """Mark what has left the list by its age, so that no list has to pass it by; False: all are marked.

        Where studies now stay longer than before, those come back.
        """
        left = now - timedelta(days=leave_after_days)
        gone = ON_THE_LIST & (study.c.arrived_at <= left) & (study.c.last_received_at <= left)
        back = study.c.forgotten & study.c.state.in_(StudyState) & (study.c.last_received_at > left)
        for chosen, forgotten in ((gone, True), (back, False)):
            query = select(study.c.study_instance_uid).where(chosen).limit(PIECE)
            with self._read() as connection:  # as a rule there are none: then nobody waits
                uids = connection.execute(query).scalars().all()
            if uids:
                with self._write() as connection:
                    these = update(study).where(study.c.study_instance_uid.in_(uids), chosen)
                    connection.execute(these.values(forgotten=forgotten))
                return True
        return False

    def entry(self, study_instance_uid: str) -> WorklistEntry | None:
        """One study, open or closed."""
        query = select(study).where(study.c.study_instance_uid == study_instance_uid)
        with self._read() as connection:
            found = entries(connection, connection.execute(query).mappings().all())
            return found[0] if found else None

    def priors(self, shown: Study, limit: int) -> list[WorklistEntry]:
        """Earlier studies of the same patient, the latest first."""
        with self._read() as connection:
            return studies.priors(connection, shown, limit)

    def search(self, text: str, limit: int = 100) -> list[WorklistEntry]:
        """Studies, open or closed, by patient ID, name, accession number or Study Instance UID."""
        query = select(study).where(matches(text)).order_by(study.c.arrived_at.desc()).limit(limit)
        with self._read() as connection:
            return entries(connection, connection.execute(query).mappings().all())

    def counts(self, now: datetime, leave_after_days: float) -> dict[StudyState, int]:
        """Open studies by state."""
        state = alone(study.c.state)
        query = select(state, func.count()).where(is_open(now, leave_after_days)).group_by(state)
        with self._read() as connection:
            return {StudyState(state): count for state, count in connection.execute(query)}

    def waiting_for_analysis_since(self) -> datetime | None:
        """When the study that has waited longest for the analyzer received its last image."""
        query = select(func.min(study.c.last_received_at)).where(
            study.c.state.in_((StudyState.READY, StudyState.ANALYZING))
        )
        with self._read() as connection:
            since: datetime | None = connection.execute(query).scalar()
            return since

    def undelivered_since(self, destinations: Collection[str]) -> datetime | None:
        """When the oldest result was written that waits for one of these destinations."""
        query = select(func.min(delivery.c.created_at)).where(
            delivery.c.state == DeliveryState.PENDING, delivery.c.destination.in_(destinations)
        )
        with self._read() as connection:
            since: datetime | None = connection.execute(query).scalar()
            return since

    def results(self, study_instance_uid: str) -> list[Result]:
        """Every revision of the answer, newest first."""
        query = (
            select(result.c.document)
            .where(result.c.study_instance_uid == study_instance_uid)
            .order_by(result.c.revision.desc())
        )
        with self._read() as connection:
            return [records.result_of(document) for document in connection.execute(query).scalars()]

    def deliveries(self, study_instance_uid: str) -> list[Delivery]:
        return self._deliveries(delivery.c.study_instance_uid == study_instance_uid)

    def _deliveries(self, chosen: ColumnElement[bool]) -> list[Delivery]:
        query = select(delivery).where(chosen).order_by(delivery.c.delivery_id)
        with self._read() as connection:
            return [records.delivery_of(row) for row in connection.execute(query).mappings()]

    # --- the policy --------------------------------------------------------------------------

    def policy(self) -> PolicyVersion | None:
        """The newest version: the one that counts."""
        return next(iter(self.policies(1)), None)

    def policies(self, limit: int) -> list[PolicyVersion]:
        """The newest versions, the newest on top."""
        with self._read() as connection:
            return policies.versions(connection, limit)

    def policy_version(self, number: int) -> PolicyVersion | None:
        with self._read() as connection:
            return policies.version(connection, number)

    def add_policy(
        self,
        new: PriorityPolicy,
        author: str,
        reason: str,
        now: datetime,
        after: int,
        placed: Sequence[Placed],
        messages: Sequence[str],
    ) -> PolicyVersion:
        """Save a version, the places that open studies have under it and its audit messages, at once.

        Raises Rejected when version ``after`` is not the newest any more.
        """
        with self._write() as connection:
            number = policies.add(connection, new, author, reason, now, after)
            policies.place(connection, placed)
            append(connection, messages)
        return PolicyVersion(version=number, author=author, reason=reason, created_at=now, policy=new)

    def place(self, placed: Sequence[Placed]) -> None:
        """Give studies their new places, but those that got another one since they were read."""
        with self._write() as connection:
            policies.place(connection, placed)

    def standing(self, now: datetime, leave_after_days: float) -> Iterator[Standing]:
        """Every open study with what decides its place; read in pieces, so that nobody has to wait."""
        chosen = is_open(now, leave_after_days)
        while True:
            with self._read() as connection:
                piece = policies.standings(connection, chosen, ORDERINGS["arrival"], PIECE)
            yield from piece
            if len(piece) < PIECE:
                return
            last = place_of("arrival", (piece[-1].arrived_at, piece[-1].study_instance_uid))
            chosen = is_open(now, leave_after_days) & (place("arrival") > last)

    def opinions(self, since: datetime) -> list[Opinion]:
        """The newest verdict on each study that arrived since then."""
        with self._read() as connection:
            return list(policies.opinions(connection, since))

    def first_arrival(self) -> datetime | None:
        """When the first study came that is on record."""
        with self._read() as connection:
            first: datetime | None = connection.execute(select(func.min(study.c.arrived_at))).scalar()
            return first

    def arrived_since(self, since: datetime, limit: int) -> list[Standing]:
        """Studies that arrived since then, open or not; of more than ``limit`` the newest, newest first."""
        with self._read() as connection:
            newest_first = [study.c.arrived_at.desc(), study.c.study_instance_uid]
            return policies.standings(connection, study.c.arrived_at >= since, newest_first, limit)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with translated(), self._writing.begin() as connection:
            yield connection


def _anew(now: datetime) -> dict[str, Any]:
    return {
        "state": DeliveryState.PENDING,
        "attempts": 0,
        "created_at": now,
        "next_attempt_at": now,
        "away": False,
    }


def _has_images_to_delete(received_before: datetime) -> ColumnElement[bool]:
    unfinished = exists().where(
        delivery.c.study_instance_uid == study.c.study_instance_uid,
        delivery.c.state.not_in((DeliveryState.SENT, DeliveryState.COMMITTED)),
    )
    newer = exists().where(
        instance.c.study_instance_uid == study.c.study_instance_uid,
        instance.c.received_at > received_before,
    )
    return and_(
        study.c.state.in_((StudyState.ANALYZED, StudyState.REJECTED)),
        study.c.last_received_at <= received_before,
        or_(study.c.images_deleted_at.is_(None), study.c.images_back),
        ~unfinished,
        ~newer,
    )


def _transition(connection: Connection, seen: Study, state: StudyState, **values: Any) -> bool:
    """Change the state only if the study is still as it was seen: nothing new has arrived since.

    Whoever held it for judging lets go of it.
    """
    changed = connection.execute(
        update(study)
        .where(
            study.c.study_instance_uid == seen.study_instance_uid,
            study.c.state == seen.state,
            study.c.attempts == seen.attempts,
            study.c.last_received_at == seen.last_received_at,
        )
        .values(state=state, lease_owner=None, lease_until=None, **values)
    )
    return changed.rowcount > 0


def _settle(
    connection: Connection,
    seen: Study,
    state: StudyState,
    answer: Result,
    priority: Priority,
    owed: Sequence[Owed],
    now: datetime,
    reason: str,
) -> bool:
    """Change the state with an answer: result row and outbox rows, unless it is the answer already.

    A closed study that is more urgent than it was when it was closed comes back: nobody has seen this answer.
    False, and nothing written, when late slices reopened the study meanwhile.
    """
    place = orders.place_values(connection, seen, priority)
    closed = (study.c.study_instance_uid == seen.study_instance_uid) & study.c.closed_at.is_not(None)
    if connection.execute(select(study.c.band).where(closed, study.c.band > place["band"])).first():
        why = f"closed before this answer came, {place['priority_reason']}"
        place |= {"closed_at": None, "closed_reason": "", "priority_reason": why}
    is_new = not _is_current(connection, answer)
    figures = policies.figures(answer, now) if is_new else {}
    values = {**place, **figures, "reason": reason, "attempts": 0, "not_before": None}
    changed = _transition(connection, seen, state, **values)
    if changed and is_new:
        _enqueue(connection, answer, _insert_result(connection, answer, now), owed, now)
    return changed


def _is_current(connection: Connection, answer: Result) -> bool:
    """True when the newest revision already is this answer: nothing is written or sent twice."""
    newest = connection.execute(
        select(result.c.content_key)
        .where(result.c.study_instance_uid == answer.study_instance_uid)
        .order_by(result.c.revision.desc())
        .limit(1)
    ).scalar()
    return newest == answer.content_key


def _insert_result(connection: Connection, answer: Result, now: datetime) -> int:
    """The number of the new revision."""
    newest = connection.execute(
        select(func.max(result.c.revision)).where(result.c.study_instance_uid == answer.study_instance_uid)
    ).scalar()
    revision = (newest or 0) + 1
    connection.execute(
        insert(result).values(
            study_instance_uid=answer.study_instance_uid,
            revision=revision,
            content_key=answer.content_key,
            status=answer.status,
            created_at=now,
            document=records.result_document(dataclasses.replace(answer, revision=revision)),
        )
    )
    return revision


def _enqueue(
    connection: Connection, answer: Result, revision: int, owed: Sequence[Owed], now: datetime
) -> None:
    """Outbox rows, of each object once. Of what is owed of a study a destination gets the newest, in order,
    and nothing that is out of date: an earlier answer that it never took, and its objects once there are
    new ones, are owed no more.
    """
    uid = answer.study_instance_uid
    for item in owed:
        ours = (delivery.c.destination == item.destination, delivery.c.study_instance_uid == uid)
        before = connection.execute(select(delivery.c.sop_instance_uid).where(*ours)).scalars().all()
        if not (item.wanted or before):
            continue
        rows: list[dict[str, Any]]
        if item.objects is None:
            rows = [{"revision": revision}]
        else:
            rows = [
                {
                    "sop_instance_uid": new.sop_instance_uid,
                    "sop_class_uid": new.sop_class_uid,
                    "path": str(new.path),
                }
                for new in item.objects
                if new.sop_instance_uid not in before
            ]
        if rows:
            connection.execute(delete(delivery).where(*ours, delivery.c.state.in_(UNSENT)))
        if item.objects:
            newest = [new.sop_instance_uid for new in item.objects]
            out_of_date = delivery.c.sop_instance_uid.not_in(newest)
            connection.execute(update(delivery).where(*ours).values(superseded=out_of_date))
        for row in rows:
            connection.execute(
                insert(delivery).values(
                    **row,
                    study_instance_uid=uid,
                    destination=item.destination,
                    state=DeliveryState.PENDING,
                    created_at=now,
                    next_attempt_at=now,
                )
            )
