"""Storage commitment of what a destination has taken: who is asked next, and what an answer changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, exists, or_, select, update

from triage.db import records
from triage.db.tables import delivery
from triage.domain import Delivery, DeliveryState, Reference

Again = Callable[[Delivery], datetime | None]
"""When to try again; None: give up."""

UNCOMMITTED = (DeliveryState.COMMITTING, DeliveryState.NOT_COMMITTED)
ANSWERABLE = (*UNCOMMITTED, DeliveryState.COMMITTED)
"""An archive that says no counts more than its list, which may have said yes."""


def due(connection: Connection, destination: str, now: datetime) -> list[Delivery]:
    """Of one study, what one destination has to be asked now: all of a transaction that it left unanswered,
    or all that is in none yet. That waits until all of the study was tried there; what is put off may be
    refused for good, and is asked for by itself once it is taken.
    """
    other = delivery.alias()
    untried = exists().where(
        other.c.destination == delivery.c.destination,
        other.c.study_instance_uid == delivery.c.study_instance_uid,
        other.c.state == DeliveryState.PENDING,
        other.c.attempts == 0,
    )
    query = (
        select(delivery)
        .where(
            delivery.c.destination == destination,
            delivery.c.state == DeliveryState.COMMITTING,
            delivery.c.next_attempt_at <= now,
            or_(delivery.c.transaction_uid.is_not(None), ~untried),
        )
        .order_by(delivery.c.delivery_id)
    )
    first = connection.execute(query.limit(1)).mappings().first()
    if first is None:
        return []
    together = query.where(
        delivery.c.study_instance_uid == first["study_instance_uid"],
        delivery.c.transaction_uid.is_not_distinct_from(first["transaction_uid"]),
    )
    return [records.delivery_of(row) for row in connection.execute(together).mappings()]


def begin(
    connection: Connection, asked: Sequence[Delivery], transaction_uid: str, answer_by: datetime
) -> None:
    """Before the request is sent: whatever happens then, its answer is known, or looked for."""
    connection.execute(
        update(delivery)
        .where(
            delivery.c.delivery_id.in_([one.delivery_id for one in asked]),
            delivery.c.state == DeliveryState.COMMITTING,
        )
        .values(transaction_uid=transaction_uid, next_attempt_at=answer_by)
    )


def put_off(
    connection: Connection, transaction_uid: str, error: str, again: Again, *, ask_anew: bool
) -> None:
    """The destination could not be asked. With ``ask_anew`` it surely does not know of the transaction."""
    for one in _of(connection, transaction_uid, (DeliveryState.COMMITTING,)):
        at = again(one)
        changed = replace(
            one,
            state=DeliveryState.NOT_COMMITTED if at is None else one.state,
            transaction_uid=None if ask_anew else transaction_uid,
            attempts=one.attempts + 1,
            last_error=error,
        )
        _change(connection, changed, at)


def settle(
    connection: Connection,
    transaction_uid: str,
    committed: Collection[Reference],
    failed: Mapping[Reference, str],
    again: Again,
    now: datetime,
    states: Collection[DeliveryState],
) -> list[Delivery]:
    """Mark what was asked for in this transaction: committed, or not kept and to be sent again.

    What is out of date is not sent again: it was sent, and that is all. What is sent again is given up
    by the time that it waited; while the archive had it is not counted. Gives what changed, as it is now.
    """
    settled = []
    for one in _of(connection, transaction_uid, states):
        if one.reference in failed and one.superseded:
            settled.append(replace(one, state=DeliveryState.SENT, last_error=failed[one.reference]))
            _change(connection, settled[-1])
        elif one.reference in failed:
            waiting = replace(one, created_at=one.created_at + (now - one.uncommitted_since))
            at = again(waiting)
            state = DeliveryState.GIVEN_UP if at is None else DeliveryState.PENDING
            settled.append(replace(waiting, state=state, last_error=failed[one.reference]))
            _change(connection, settled[-1], at)
        elif one.reference in committed and one.state is not DeliveryState.COMMITTED:
            settled.append(replace(one, state=DeliveryState.COMMITTED, last_error=""))
            _change(connection, settled[-1])
    return settled


def destination_of(connection: Connection, transaction_uid: str) -> str | None:
    """Who was asked in this transaction; None when nobody was."""
    query = select(delivery.c.destination).where(delivery.c.transaction_uid == transaction_uid).limit(1)
    found: str | None = connection.execute(query).scalar()
    return found


def ask_anew(connection: Connection, destination: str, study_instance_uid: str | None, now: datetime) -> int:
    """Whatever was asked before; how many objects there are to ask for."""
    chosen = (delivery.c.destination == destination) & delivery.c.state.in_(UNCOMMITTED)
    if study_instance_uid is not None:
        chosen &= delivery.c.study_instance_uid == study_instance_uid
    anew = {"state": DeliveryState.COMMITTING, "transaction_uid": None, "attempts": 0}
    waiting = update(delivery).where(chosen)
    return connection.execute(waiting.values(**anew, created_at=now, next_attempt_at=now)).rowcount


def waive(connection: Connection, all_but: Collection[str]) -> None:
    """Ask no more of destinations that are not asked any longer: what they took was sent, and that is all."""
    connection.execute(
        update(delivery)
        .where(delivery.c.state == DeliveryState.COMMITTING, delivery.c.destination.not_in(all_but))
        .values(state=DeliveryState.SENT)
    )


def _of(connection: Connection, transaction_uid: str, states: Collection[DeliveryState]) -> list[Delivery]:
    query = select(delivery).where(
        delivery.c.transaction_uid == transaction_uid, delivery.c.state.in_(states)
    )
    return [records.delivery_of(row) for row in connection.execute(query).mappings()]


def _change(connection: Connection, changed: Delivery, next_attempt_at: datetime | None = None) -> None:
    values: dict[str, Any] = {} if next_attempt_at is None else {"next_attempt_at": next_attempt_at}
    connection.execute(
        update(delivery)
        .where(delivery.c.delivery_id == changed.delivery_id)
        .values(
            state=changed.state,
            transaction_uid=changed.transaction_uid,
            attempts=changed.attempts,
            created_at=changed.created_at,
            last_error=changed.last_error,
            **values,
        )
    )
