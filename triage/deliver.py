"""Outbox → destinations. Nothing is marked sent before the peer's success; the rest is tried again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from hashlib import sha256
from random import SystemRandom

from triage.config import AnyDestination, Config, Destination, DicomWeb, Email, Hl7, Webhook
from triage.config import Delivery as DeliverySettings
from triage.db import Database
from triage.dicom import sender, storage_commitment, stow
from triage.dicom.sender import SendOutcome
from triage.domain import Delivery, Result
from triage.errors import Retryable, traced
from triage.logs import about
from triage.outgoing import email, hl7, webhook
from triage.outgoing.letters import Letter, Outcome

log = logging.getLogger(__name__)

JITTER = 0.2
"""The share of a wait that is left to chance, so that what failed together is not tried again together."""
LONGEST_REST = timedelta(days=1)
"""A server that names its own wait (Retry-After) is given it up to here."""
IDENTITY_LENGTH = 20
"""Characters of an HL7 message control ID (MSH-10, HL7 v2.5.1)."""
_chance = SystemRandom()


def step(db: Database, config: Config, destination: AnyDestination, now: datetime) -> bool:
    """Send what one destination is owed now of one study; False when nothing is due.

    A destination that is away holds up nobody else: each has a schedule of its own. When it is back, all that
    waited for it goes at once. A study's objects go over one association, in order: where one is refused for
    now, those after it wait, and no other study does. Answers go one by one: each is marked before the next.
    """
    takes_objects = isinstance(destination, Destination | DicomWeb)
    owed = db.due_deliveries(destination.name, now, limit=100 if takes_objects else 1)
    possible = [delivery for delivery in owed if (delivery.path is not None) == takes_objects]
    for delivery in owed:
        if delivery not in possible:
            db.give_up(delivery.delivery_id, f"{destination.name} is of kind {destination.kind} now")
    possible = [one for one in possible if one.study_instance_uid == possible[0].study_instance_uid]
    about(possible[0].study_instance_uid if possible else "")
    for delivery, outcome in _tried(db, possible, destination, config, now) if possible else ():
        if outcome.sent:
            commit = isinstance(destination, Destination) and destination.commitment
            db.mark_sent(delivery.delivery_id, now, commit=commit)
            db.wake(destination.name, now)
            log.info("%s sent to %s", delivery.name, destination.name)
        else:
            _put_off(db, config.delivery, delivery, outcome, now)
    return bool(owed)


def reach(destination: AnyDestination, config: Config) -> str | None:
    """None when the destination answers, otherwise what is wrong."""
    timeout = config.delivery.timeout_seconds
    match destination:
        case Destination():
            wrong = sender.echo(destination, config.listener.ae_title, timeout)
            if wrong is None and destination.commitment:
                return storage_commitment.offered(destination, config.listener.ae_title, timeout)
            return wrong
        case DicomWeb():
            return stow.reach(destination, timeout)
        case Hl7():
            return hl7.reach(destination, timeout)
        case Webhook():
            return webhook.reach(destination, timeout)
        case Email():
            return email.reach(destination, timeout)


def _tried(
    db: Database, owed: Sequence[Delivery], destination: AnyDestination, config: Config, now: datetime
) -> Iterator[tuple[Delivery, SendOutcome | Outcome]]:
    """Each delivery that was tried, with what became of it."""
    try:
        yield from _send(db, owed, destination, config, now)
    except Retryable:
        raise
    except Exception as error:  # noqa: BLE001 - what trips us must not hold up all others
        log.error("%s was not sent to %s: %s", owed[0].name, destination.name, traced(error))
        yield owed[0], Outcome(False, error=f"internal error: {type(error).__name__}")


def _send(
    db: Database, owed: Sequence[Delivery], destination: AnyDestination, config: Config, now: datetime
) -> Iterator[tuple[Delivery, SendOutcome | Outcome]]:
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
        study, place, answer = db.answer(delivery)
        letter = Letter(identity(destination.name, answer), study, place, answer, now)
        yield delivery, _post(letter, destination, timeout)


def identity(destination: str, answer: Result) -> str:
    """The same for every try, so that a peer whose acknowledgement was lost takes the answer once; and no
    other answer's, also of another database or installation.
    """
    facts = (destination, answer.study_instance_uid, str(answer.revision), answer.content_key)
    return sha256("\n".join(facts).encode()).hexdigest()[:IDENTITY_LENGTH]


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
    error = " ".join(filter(None, [outcome.error, outcome.said]))
    if rest := _rest(outcome.retry_after, now):
        db.rest(delivery.destination, now + rest)
    if now - delivery.created_at >= timedelta(hours=settings.give_up_hours):
        db.give_up(delivery.delivery_id, error)
        return
    wait = growing_wait(settings, delivery.attempts, permanent=outcome.permanent)
    db.postpone(delivery.delivery_id, error, now + max(wait, rest), away=outcome.away)


def growing_wait(settings: DeliverySettings, attempts: int, *, permanent: bool) -> timedelta:
    """Until the next try after so many; what needs somebody's hand waits longest."""
    longest = settings.longest_retry_seconds
    growing = longest if permanent else settings.first_retry_seconds * 2.0 ** min(attempts, 20)
    return timedelta(seconds=_chance.uniform(1 - JITTER, 1) * min(growing, longest))


def _rest(retry_after: str, now: datetime) -> timedelta:
    """How long a server wants to be left alone: seconds or a date (RFC 9110, section 10.2.3); else not."""
    try:
        if retry_after.strip().isdecimal():
            wanted = timedelta(seconds=int(retry_after))
        else:
            wanted = parsedate_to_datetime(retry_after).replace(tzinfo=UTC) - now
    except (ValueError, OverflowError):
        return timedelta()
    return min(max(wanted, timedelta()), LONGEST_REST)
