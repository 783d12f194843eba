"""Received instances → studies; quiet studies → a chosen series, or the reason why there is none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from triage import outbox, priority
from triage.config import Config
from triage.db import Database
from triage.dicom import series
from triage.domain import Instance, Priority, Result, Status, Study, content_digest
from triage.errors import Rejected, Retryable

log = logging.getLogger(__name__)

NOT_COMPARED = "not compared with the archive, which did not answer: images may be missing"


def register(db: Database, config: Config, received: Instance, now: datetime) -> None:
    """Put a stored instance on record. Only CT images reopen a study: our own results, dose reports and
    pictures that a PACS routes along are filed and nothing more. Raises Retryable.
    """

    def pending(arrived_at: datetime, stat: bool) -> Priority:
        return priority.pending(arrived_at, stat, config.priority)

    stat = received.requested_procedure_priority == priority.STAT
    judgeable = series.is_ct_image(received)
    db.register(received, now, judgeable=judgeable, stat=stat, pending=pending)


def step(db: Database, config: Config, now: datetime) -> bool:
    """Move one quiet study on to READY or REJECTED; False when none has been quiet long enough.

    What is chosen is not stored: choosing is pure and takes milliseconds, so the analyzer repeats it.
    """
    quiet_since = now - timedelta(seconds=config.assemble.quiet_seconds)
    if config.pull.reconcile is None:
        study = db.quiet_study(quiet_since)
    else:
        study = db.quiet_study(quiet_since, quiet_since - timedelta(seconds=config.pull.reconcile_seconds))
        if study is not None and study.completeness is None:
            db.mark_compared(study, NOT_COMPARED)
    if study is None:
        return False
    try:
        _assemble(db, config, study, now)
    except Retryable:
        raise
    except Exception as error:  # a study that trips us must not hold up all others
        fail(db, config, study, f"internal error: {type(error).__name__}", None)
        raise
    return True


def _assemble(db: Database, config: Config, study: Study, now: datetime) -> None:
    instances = db.instances(study.study_instance_uid)
    try:
        series.choose(instances, config.assemble)
    except Rejected as rejection:
        reject(db, config, study, instances, str(rejection), now)
    else:
        db.mark_ready(study)
        log.info("study %s is complete: %d instances", study.study_instance_uid, len(instances))


def reject(
    db: Database, config: Config, study: Study, instances: Sequence[Instance], reason: str, now: datetime
) -> None:
    """Put "not analysable" and its reason on the list; the study keeps its place or moves up."""
    place = _place(db, config, study, reason)
    answer = not_analysable(instances, reason)
    owed = outbox.owed(config.delivery.destinations, answer, place, ())
    if db.mark_rejected(study, answer, place, now, owed):
        log.info("study %s is not analysable: %s", study.study_instance_uid, reason)


def fail(
    db: Database, config: Config, study: Study, reason: str, retry_at: datetime | None, attempts: int = 0
) -> None:
    """Put "failed" on the list, and whether it will be tried again; the study keeps its place or moves up.

    ``attempts`` are those that count towards giving up.
    """
    said = f"failed, {'will be retried' if retry_at else 'given up'}: {reason}"
    if db.mark_failed(study, reason, _place(db, config, study, said), retry_at, attempts):
        log.error("study %s %s", study.study_instance_uid, said)


def _place(db: Database, config: Config, study: Study, reason: str) -> Priority:
    entry = db.entry(study.study_instance_uid)
    before = entry.priority if entry else priority.pending(study.arrived_at, study.stat, config.priority)
    return priority.not_judged(before, study.arrived_at, study.stat, reason, config.priority)


def not_analysable(instances: Sequence[Instance], reason: str) -> Result:
    """The answer for a study that cannot be judged."""
    return Result(
        study_instance_uid=instances[0].study_instance_uid,
        patient_id=instances[0].patient_id,
        status=Status.NOT_ANALYSABLE,
        reason=reason,
        content_key=hashlib.sha256(f"{reason}\n{content_digest(instances)}".encode()).hexdigest(),
    )
