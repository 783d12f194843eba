"""The report of a study that was not judged: not analysable, or failed and given up."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from triage.config import Results
from triage.dicom import files, series
from triage.dicom.header import BROKEN
from triage.domain import Instance, Result, ResultKind, ResultObject, content_digest
from triage.errors import Rejected

log = logging.getLogger(__name__)

REPORT_VERSION = 1
"""Raised whenever the same images and reason give another report than before."""
UNWRITABLE = (Rejected, RuntimeError, MemoryError, *BROKEN)
"""What images too odd to be judged may raise when they are reported: the list says it all the same."""

Told = tuple[Result, tuple[ResultObject, ...]]


def tell(
    answer: Result,
    instances: Sequence[Instance],
    earlier: Sequence[Result],
    settings: Results,
    folder: Path,
    now: datetime,
) -> Told:
    """The answer and its report, written into ``folder``.

    ``earlier`` are the study's revisions, newest first: the report replaces theirs, and where the newest says
    the same already nothing is written again. Raises Retryable when source or disk fail.
    """
    images = [i for i in instances if series.is_ct_image(i)] or list(instances)
    previous = next((result for result in earlier if result.sr_sop_instance_uid), None)
    if previous is not None and previous is earlier[0]:
        key = _content_key(answer, images, settings, previous.supersedes)
        if previous.content_key == key:
            return previous, ()
    supersedes = previous.sr_sop_instance_uid if previous else None
    answer = replace(
        answer, content_key=_content_key(answer, images, settings, supersedes), supersedes=supersedes
    )
    try:
        return _report(answer, images, settings, folder, now, report_at_hand(previous))
    except UNWRITABLE as error:
        uid, kind = answer.study_instance_uid, type(error).__name__
        log.warning("study %s goes without a report, which could not be written: %s", uid, kind)
        return answer, ()


def report_at_hand(previous: Result | None) -> Path | None:
    """The earlier report's file; someone may have tidied the spool, which must not stop a judgement."""
    path = previous.files.get(ResultKind.SR) if previous else None
    return path if path is not None and path.exists() else None


def _report(
    answer: Result,
    images: Sequence[Instance],
    settings: Results,
    folder: Path,
    now: datetime,
    predecessor: Path | None,
) -> Told:
    from triage.dicom import sr  # half a second to load: the listener, which never reports, starts without

    files.make_folder(folder)
    report = sr.write_unjudged(
        images, answer, folder, now=now, sop_class=settings.sr, predecessor=predecessor
    )
    told = replace(answer, sr_sop_instance_uid=report.sop_instance_uid, files={report.kind: report.path})
    return told, (report,)


def _content_key(
    answer: Result, images: Sequence[Instance], settings: Results, supersedes: str | None
) -> str:
    """Same images and reason after the same report: the same key, hence the same object UIDs."""
    facts = [
        REPORT_VERSION,
        answer.status.value,
        answer.reason,
        content_digest(images),
        settings.sr,
        supersedes,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
