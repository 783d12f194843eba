"""Outbox → destinations. Nothing is marked sent before the peer's success; the rest is tried again."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from triage.config import Config, Destination
from triage.config import Delivery as DeliverySettings
from triage.db import Database
from triage.dicom import sender
from triage.dicom.sender import SendOutcome
from triage.domain import Delivery

log = logging.getLogger(__name__)


def step(db: Database, config: Config, destination: Destination, now: datetime) -> bool:
    """Send what one destination is owed now over one association; False when nothing is due.

    A destination that is away holds up nobody else: each has a schedule of its own. An object at which
    the peer breaks off holds up nothing: what was not tried stays due and goes without it next time.
    """
    owed = db.due_deliveries(destination.name, now)
    if not owed:
        return False
    outcomes = sender.send(
        [delivery.path for delivery in owed],
        destination,
        calling_ae_title=config.listener.ae_title,
        timeout_seconds=config.delivery.timeout_seconds,
    )
    for delivery, outcome in zip(owed, outcomes, strict=True):
        if outcome.sent:
            db.mark_sent(delivery.delivery_id, now)
            log.info("%s sent to %s", delivery.sop_instance_uid, destination.name)
        elif outcome.tried:
            _put_off(db, config.delivery, delivery, outcome, now)
    return True


def _put_off(
    db: Database, settings: DeliverySettings, delivery: Delivery, outcome: SendOutcome, now: datetime
) -> None:
    """Try again after a growing wait; give up only after days, and say so on the list.

    What the peer will refuse again is tried rarely from the start: someone must change its settings first.
    """
    log.warning("%s not sent to %s: %s", delivery.sop_instance_uid, delivery.destination, outcome.error)
    if now - delivery.created_at >= timedelta(hours=settings.give_up_hours):
        db.give_up(delivery.delivery_id, outcome.error)
        return
    longest = settings.longest_retry_seconds
    growing = settings.first_retry_seconds * 2.0 ** min(delivery.attempts, 20)
    wait = longest if outcome.permanent else min(growing, longest)
    db.postpone(delivery.delivery_id, outcome.error, now + timedelta(seconds=wait))
