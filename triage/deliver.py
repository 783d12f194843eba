"""Outbox → destinations. Nothing is marked sent before the peer's success; the rest is tried again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from random import SystemRandom

from triage.config import AnyDestination, Config, Destination, DicomWeb, Email, Hl7, Webhook
from triage.config import Delivery as DeliverySettings
from triage.db import Database
from triage.dicom import sender, stow
from triage.dicom.sender import SendOutcome
from triage.domain import Delivery
from triage.outgoing import email, hl7, webhook
from triage.outgoing.letters import Letter, Outcome

log = logging.getLogger(__name__)

JITTER = 0.2
"""The share of a wait that is left to chance, so that what failed together is not tried again together."""
_chance = SystemRandom()


def step(db: Database, config: Config, destination: AnyDestination, now: datetime) -> bool:
    """Send what one destination is owed now; False when nothing is due.

    A destination that is away holds up nobody else: each has a schedule of its own. Objects go over one
    association, and one at which the peer breaks off holds up nothing: what was not tried stays due and goes
    without it next time. Answers go one by one: each is marked before the next is sent.
    """
    takes_objects = isinstance(destination, Destination | DicomWeb)
    owed = db.due_deliveries(destination.name, now, limit=100 if takes_objects else 1)
    possible = [delivery for delivery in owed if (delivery.path is not None) == takes_objects]
    for delivery in owed:
        if delivery not in possible:
            db.give_up(delivery.delivery_id, f"{destination.name} is of kind {destination.kind} now")
    for delivery, outcome in _send(db, possible, destination, config, now) if possible else ():
        if outcome.sent:
            db.mark_sent(delivery.delivery_id, now)
            log.info("%s sent to %s", delivery.name, destination.name)
        else:
            _put_off(db, config.delivery, delivery, outcome, now)
    return bool(owed)


def reach(destination: AnyDestination, config: Config) -> str | None:
    """None when the destination answers, otherwise what is wrong."""
    timeout = config.delivery.timeout_seconds
    match destination:
        case Destination():
            return sender.echo(destination, config.listener.ae_title, timeout)
        case DicomWeb():
            return stow.reach(destination, timeout)
        case Hl7():
            return hl7.reach(destination, timeout)
        case Webhook():
            return webhook.reach(destination, timeout)
        case Email():
            return email.reach(destination, timeout)


def _send(
    db: Database, owed: Sequence[Delivery], destination: AnyDestination, config: Config, now: datetime
) -> Iterator[tuple[Delivery, SendOutcome | Outcome]]:
    """Each delivery that was tried, with what became of it."""
    timeout = config.delivery.timeout_seconds
    if isinstance(destination, Destination | DicomWeb):
        paths = [delivery.path for delivery in owed if delivery.path is not None]
        outcomes = (
            stow.send(paths, destination, timeout_seconds=timeout)
            if isinstance(destination, DicomWeb)
            else sender.send(
                paths, destination, calling_ae_title=config.listener.ae_title, timeout_seconds=timeout
            )
        )
        tried = zip(owed, outcomes, strict=True)
        yield from ((delivery, outcome) for delivery, outcome in tried if outcome.tried)
        return
    for delivery in owed:
        letter = Letter(f"triage.{delivery.delivery_id}", *db.answer(delivery), now)
        yield delivery, _post(letter, destination, timeout)


def _post(letter: Letter, destination: Hl7 | Webhook | Email, timeout: float) -> Outcome:
    match destination:
        case Hl7():
            return hl7.send(letter, destination, timeout)
        case Webhook():
            return webhook.send(letter, destination, timeout)
        case Email():
            return email.send(letter, destination, timeout)


def _put_off(
    db: Database,
    settings: DeliverySettings,
    delivery: Delivery,
    outcome: SendOutcome | Outcome,
    now: datetime,
) -> None:
    """Try again after a growing wait; give up only after days, and say so on the list.

    What the peer will refuse again is tried rarely from the start: someone must change its settings first.
    """
    log.warning("%s not sent to %s: %s", delivery.name, delivery.destination, outcome.error)
    if now - delivery.created_at >= timedelta(hours=settings.give_up_hours):
        db.give_up(delivery.delivery_id, outcome.error)
        return
    longest = settings.longest_retry_seconds
    growing = settings.first_retry_seconds * 2.0 ** min(delivery.attempts, 20)
    wait = longest if outcome.permanent else _chance.uniform(1 - JITTER, 1) * min(growing, longest)
    db.postpone(delivery.delivery_id, outcome.error, now + timedelta(seconds=wait))
