"""Received instances → studies; quiet studies → a chosen series, or the reason why there is none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from triage import priority
from triage.config import Config
from triage.db import Database, Registered
from triage.dicom import series
from triage.domain import Instance, Result, Status, Study
from triage.errors import Rejected

log = logging.getLogger(__name__)


def register(db: Database, config: Config, received: Instance, now: datetime) -> Registered:
    """Put a stored instance on record. Only CT images open or reopen a study: our own results, dose
    reports and pictures that a PACS routes along are filed and nothing more. Raises Retryable.
    """
    stat = received.requested_procedure_priority == priority.STAT
    return db.register(
        received,
        now,
        judgeable=series.is_ct_image(received),
        stat=stat,
        pending=priority.pending(now, stat, config.priority),
    )


def step(db: Database, config: Config, now: datetime) -> bool:
    """Move one quiet study on to READY or REJECTED; False when none has been quiet long enough.

    What is chosen is not stored: choosing is pure and takes milliseconds, so the analyzer repeats it.
    """
    study = db.quiet_study(now - timedelta(seconds=config.assemble.quiet_seconds))
    if study is None:
        return False
    instances = db.instances(study.study_instance_uid)
    try:
        series.choose(instances, config.assemble)
    except Rejected as rejection:
        reject(db, config, study, instances, str(rejection), now)
    else:
        db.mark_ready(study)
        log.info("study %s is complete: %d instances", study.study_instance_uid, len(instances))
    return True


def reject(
    db: Database, config: Config, study: Study, instances: Sequence[Instance], reason: str, now: datetime
) -> None:
    """Put "not analysable" and its reason on the list; the study keeps its place or moves up."""
    entry = db.entry(study.study_instance_uid)
    before = entry.priority if entry else priority.pending(study.arrived_at, study.stat, config.priority)
    place = priority.not_judged(before, study.arrived_at, study.stat, reason, config.priority)
    db.mark_rejected(study, not_analysable(instances, reason), place, now)
    log.info("study %s is not analysable: %s", study.study_instance_uid, reason)


def not_analysable(instances: Sequence[Instance], reason: str) -> Result:
    """The answer for a study that cannot be judged."""
    content = sorted(f"{i.sop_instance_uid}:{i.digest}" for i in instances)
    return Result(
        study_instance_uid=instances[0].study_instance_uid,
        patient_id=instances[0].patient_id,
        status=Status.NOT_ANALYSABLE,
        reason=reason,
        content_key=hashlib.sha256("\n".join([reason, *content]).encode()).hexdigest(),
    )
