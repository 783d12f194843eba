"""Messages from the RIS → the list: STAT orders move up, also before their images; read studies leave it.

Nothing is acknowledged before it is stored, and everything is harmless when it comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime

from triage import policies, priority
from triage.config import Config, Peer
from triage.db import Database
from triage.dicom import asking
from triage.domain import News, Ordered
from triage.errors import Rejected, Retryable, traced
from triage.incoming import messages
from triage.incoming.messages import NotTaken

log = logging.getLogger(__name__)


def receive(db: Database, config: Config, raw: bytes, now: datetime) -> bytes:
    """Store what one HL7 message tells; the acknowledgment, with the reason where it was not stored."""
    message, refusal = None, None
    try:
        message = messages.parse(raw)
        _hear(db, config, messages.news(message, config.orders), now)
    except NotTaken as error:
        refusal = error
    except Rejected as error:
        refusal = NotTaken(messages.ERROR, messages.UNKNOWN_KEY, str(error))
    except Retryable as error:
        refusal = NotTaken(messages.REJECTED, messages.INTERNAL, f"{error}; send it again")
    except Exception as error:  # noqa: BLE001 - one message must not end the receiving of others
        log.error("unexpected error in an HL7 message: %s", traced(error))
        refusal = NotTaken(messages.REJECTED, messages.INTERNAL, f"internal error: {type(error).__name__}")
    if refusal is not None:
        log.warning("HL7 message refused (%s): %s", refusal.acknowledgment, refusal)
    return messages.acknowledgment(message, refusal, now)


def _hear(db: Database, config: Config, news: Sequence[News], now: datetime) -> None:
    for uid, change in db.hear(news, policies.pending(db, config), now):
        log.info("study %s %s", uid, change)


def step(db: Database, config: Config, ris: Peer, now: datetime) -> bool:
    """Ask the RIS with what priority one study was ordered; False when every open study has been asked for.

    Each is asked for once: what the RIS changes later it says by HL7. Raises Retryable where it gave no
    answer; that study then waits for its next turn, after all others.
    """
    study = db.study_to_ask_for(now, config.retention.leave_list_after_days)
    if study is None:
        return False
    try:
        priorities = asking.ordered_priority(
            study.accession_number,
            ris,
            calling_ae_title=config.listener.ae_title,
            timeout_seconds=config.delivery.timeout_seconds,
        )
    except Rejected as error:
        log.warning("study %s: %s", study.study_instance_uid, error)
    except Retryable:
        db.mark_asked_for(study.study_instance_uid, now, answered=False)
        raise
    else:
        if priority.STAT in priorities:
            _hear(db, config, [Ordered(study.accession_number, stat=True)], now)
    db.mark_asked_for(study.study_instance_uid, now, answered=True)
    return True
