"""Received instances → studies; quiet studies → a chosen series, or the reason why there is none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from triage import outbox, policies, priority, unjudged
from triage.config import Config
from triage.db import Database
from triage.dicom import series
from triage.domain import Instance, Priority, Result, Status, Study, content_digest
from triage.errors import Rejected, Retryable
from triage.logs import about

log = logging.getLogger(__name__)

LONGEST_RETRY = timedelta(minutes=15)
NOT_COMPARED = "not compared with the archive, which did not answer: images may be missing"


def register(db: Database, config: Config, received: Instance, now: datetime) -> None:
    """Put a stored instance on record. Only CT images reopen a study: our own results, dose reports and
    pictures that a PACS routes along are filed and nothing more. Raises Retryable.
    """
    stat = received.requested_procedure_priority == priority.STAT
    judgeable = series.is_ct_image(received)

    def pending(arrived_at: datetime, stat: bool) -> Priority:
        return policies.pending(db, config)(arrived_at, stat)  # asked for when a study is placed, not before

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
    about(study.study_instance_uid)
    try:
        _assemble(db, config, study, now)
    except Retryable:
        raise
    except Exception as error:  # a study that trips us must not hold up all others
        give_up(db, config, study, f"internal error: {type(error).__name__}", now)
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
    try:
        answer, objects = _told(db, config, not_analysable(instances, reason), instances, now)
    except Retryable as failure:
        try_later(db, config, study, str(failure), now)
        return
    place = _place(db, config, study, reason)
    owed = outbox.owed(config.destinations, answer, place, objects)
    if db.mark_rejected(study, answer, place, now, owed):
        log.info("study %s is not analysable: %s", study.study_instance_uid, reason)


def fail(
    db: Database, config: Config, study: Study, reason: str, retry_at: datetime, attempts: int = 0
) -> None:
    """Put "failed, will be retried" on the list; the study keeps its place or moves up.

    ``attempts`` are those that count towards giving up.
    """
    said = f"failed, will be retried: {reason}"
    if db.mark_failed(study, reason, _place(db, config, study, said), retry_at, attempts):
        log.error("study %s %s", study.study_instance_uid, said)


def try_later(db: Database, config: Config, study: Study, reason: str, now: datetime) -> None:
    """Disk, memory or device failed: not the study's fault, so it is never given up for that.

    The longer it has waited, the longer it waits again, up to LONGEST_RETRY.
    """
    waited = now - study.last_received_at
    shortest = timedelta(seconds=config.analysis.retry_seconds)
    fail(db, config, study, reason, now + min(max(waited, shortest), LONGEST_RETRY))


def give_up(db: Database, config: Config, study: Study, reason: str, now: datetime) -> None:
    """Put "failed, given up" on the list, and tell who wants to know; the place is kept or moves up."""
    said = f"failed, given up: {reason}"
    instances = db.instances(study.study_instance_uid)
    try:
        answer, objects = _told(db, config, given_up(study, reason), instances, now)
    except Retryable as failure:
        try_later(db, config, study, f"{reason}; {failure}", now)
        return
    place = _place(db, config, study, said)
    owed = outbox.owed(config.destinations, answer, place, objects)
    if db.mark_given_up(study, answer, place, now, owed):
        log.error("study %s %s", study.study_instance_uid, said)


def results_folder(config: Config, study_instance_uid: str, now: datetime) -> Path:
    """Where to write what is sent: each attempt has a folder of its own, so that nothing sent is overwritten.

    Raises Retryable when the study's folder is not there.
    """
    home = config.storage.spool / study_instance_uid
    if not home.is_dir():
        raise Retryable(f"the study's images are not in {config.storage.spool}: is the disk mounted?")
    return home / "results" / f"{now:%Y%m%dT%H%M%S%f}"


def _told(
    db: Database, config: Config, answer: Result, instances: Sequence[Instance], now: datetime
) -> unjudged.Told:
    """The answer with its report, where the site wants one; raises Retryable."""
    uid = answer.study_instance_uid
    if not config.results.sr_not_judged:
        return answer, ()
    folder = results_folder(config, uid, now)
    return unjudged.tell(answer, instances, db.results(uid), config.results, folder, now)


def _place(db: Database, config: Config, study: Study, reason: str) -> Priority:
    entry = db.entry(study.study_instance_uid)
    policy = policies.in_force(db, config).priority
    before = entry.priority if entry else priority.pending(study.arrived_at, study.stat, policy)
    return priority.not_judged(before, study.arrived_at, study.stat, reason, policy)


def given_up(study: Study, reason: str) -> Result:
    """The answer for a study that we failed to judge; the same reason again is no other answer."""
    return Result(
        study_instance_uid=study.study_instance_uid,
        patient_id=study.patient_id,
        status=Status.FAILED,
        reason=reason,
        content_key=hashlib.sha256(f"{Status.FAILED}\n{reason}".encode()).hexdigest(),
    )


def not_analysable(instances: Sequence[Instance], reason: str) -> Result:
    """The answer for a study that cannot be judged."""
    return Result(
        study_instance_uid=instances[0].study_instance_uid,
        patient_id=instances[0].patient_id,
        status=Status.NOT_ANALYSABLE,
        reason=reason,
        content_key=hashlib.sha256(f"{reason}\n{content_digest(instances)}".encode()).hexdigest(),
    )
