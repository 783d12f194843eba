"""Delivered → committed: who took objects is asked to keep them, and its answer is marked.

    sent ─▶ committing ── N-ACTION ──▶ the answer, on the same association or at our listener
              │  ▲                       committed ─▶ committed
              │  └─ away, refused:       failed ─▶ pending: sent again
              │     asked again later
              └──── silence: C-FIND      listed ─▶ committed      not listed ─▶ pending: sent again

A transaction is on record before its request leaves: after a kill its answer is known, or looked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from uuid import uuid4

from triage.config import Config, Destination
from triage.db import Database
from triage.deliver import growing_wait
from triage.dicom import storage_commitment
from triage.dicom.storage_commitment import Report
from triage.domain import Delivery, DeliveryState
from triage.errors import Rejected, Retryable

log = logging.getLogger(__name__)


def step(db: Database, config: Config, destination: Destination, now: datetime) -> bool:
    """Ask one destination to keep what it took of one study, or look whether it does after its silence.

    False when nothing is due.
    """
    owed = db.due_commitment(destination.name, now)
    if not owed:
        return False
    if (transaction_uid := owed[0].transaction_uid) is None:
        _ask(db, config, destination, owed, now)
    else:
        _look(db, config, destination, owed, transaction_uid, now)
    return True


def take(db: Database, config: Config, report: Report, now: datetime) -> bool:
    """Mark what an archive reports. False, and nothing marked, where it was not asked that.

    It must have the AE title of the destination that was asked, and only what it was asked for counts. The
    transaction's UID is random: besides us, that destination alone knows it.
    """
    name = db.destination_of_commitment(report.transaction_uid)
    if report.ae_title not in (one.ae_title for one in wanted(config) if one.name == name):
        return False
    failed = {key: f"destination {name} does not commit itself: {why}" for key, why in report.failed.items()}
    settled = db.settle_commitment(
        report.transaction_uid, report.committed, failed, _sending_again(config, now), now
    )
    _log(settled)
    return True


def wanted(config: Config) -> list[Destination]:
    """The destinations whose commitment is wanted; their answers count whenever they come."""
    return [one for one in config.delivery.destinations if isinstance(one, Destination) and one.commitment]


def asked(config: Config) -> list[Destination]:
    """Those of them that are asked now: in shadow mode live ones hear nothing of us."""
    return [one for one in wanted(config) if one in config.destinations]


def _ask(
    db: Database, config: Config, destination: Destination, owed: Sequence[Delivery], now: datetime
) -> None:
    transaction_uid = f"2.25.{uuid4().int}"
    answer_by = now + timedelta(seconds=config.delivery.commitment_seconds)
    db.begin_commitment(owed, transaction_uid, answer_by)
    try:
        storage_commitment.request(
            destination,
            transaction_uid,
            owed,
            lambda report: take(db, config, report, now),
            calling_ae_title=config.listener.ae_title,
            timeout_seconds=config.delivery.timeout_seconds,
        )
    except (Rejected, Retryable) as error:
        log.warning("no commitment to %d objects: %s", len(owed), error)
        db.put_off_commitment(transaction_uid, str(error), _asking_again(config, error, now), ask_anew=True)
    else:
        log.info("%s was asked to keep %d objects: %s", destination.name, len(owed), transaction_uid)


def _look(
    db: Database,
    config: Config,
    destination: Destination,
    silent: Sequence[Delivery],
    transaction_uid: str,
    now: datetime,
) -> None:
    try:
        kept = storage_commitment.listed(
            destination,
            silent,
            calling_ae_title=config.listener.ae_title,
            timeout_seconds=config.delivery.timeout_seconds,
        )
    except (Rejected, Retryable) as error:
        log.warning("no commitment to %d objects: %s", len(silent), error)
        db.put_off_commitment(transaction_uid, str(error), _asking_again(config, error, now), ask_anew=False)
        return
    lost = f"destination {destination.name} was silent on its commitment and does not list the object"
    missing = {one.reference: lost for one in silent if one.reference not in kept}
    # An answer that came meanwhile counts more than this.
    unanswered = (DeliveryState.COMMITTING,)
    again = _sending_again(config, now)
    _log(db.settle_commitment(transaction_uid, kept, missing, again, now, unanswered))


def _sending_again(config: Config, now: datetime) -> Callable[[Delivery], datetime | None]:
    return lambda one: _next_try(config, one, one.created_at, now)


def _asking_again(
    config: Config, error: Rejected | Retryable, now: datetime
) -> Callable[[Delivery], datetime | None]:
    permanent = isinstance(error, Rejected)

    def again(one: Delivery) -> datetime | None:
        return _next_try(config, one, one.uncommitted_since, now, permanent)

    return again


def _next_try(
    config: Config, one: Delivery, since: datetime, now: datetime, permanent: bool = False
) -> datetime | None:
    if now - since >= timedelta(hours=config.delivery.give_up_hours):
        return None
    return now + growing_wait(config.delivery, one.attempts, permanent=permanent)


def _log(settled: Sequence[Delivery]) -> None:
    for one in settled:
        if one.state is DeliveryState.COMMITTED:
            log.info("%s committed by %s", one.name, one.destination)
        else:
            log.warning("%s not committed by %s: %s", one.name, one.destination, one.last_error)
