"""The spool kept in order: images of old, delivered studies are deleted, strays are put aside.

Both are off the way of a study: nothing that is not delivered, and nothing that can be read, is ever lost.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from triage import assemble
from triage.config import Config
from triage.db import Database
from triage.dicom import files, header
from triage.dicom.spool import DELETED, QUARANTINE, RESULTS
from triage.errors import Rejected, Retryable

log = logging.getLogger(__name__)

STUDY = re.compile(r"[0-9.]+")
"""A folder of another name, as a file system's own, is not ours."""
SETTLED = timedelta(hours=1)
"""Whatever is younger may be in the middle of being filed or judged."""


def delete_images(db: Database, config: Config, now: datetime) -> bool:
    """Delete received images of some studies that are old and wholly delivered; False when there are none.

    Answers, reports, masks and pictures stay.
    """
    days, spool = config.retention.delete_images_after_days, config.storage.spool
    if days is None:
        return False
    before, count = now - timedelta(days=days), 0
    with files.may_delete(spool) as may:
        if not may:
            return False
        for uid in [*(left.name for left in _folders(spool / DELETED)), *db.images_to_delete(before)]:
            try:
                count += _delete_images(db, spool, uid, before, now)
            except Retryable as failure:  # the others need not wait for it
                log.warning("%s", failure)
    if count:
        log.info("the images of %d studies were deleted: older than %g days and delivered", count, days)
    return count > 0


def _delete_images(db: Database, spool: Path, uid: str, before: datetime, now: datetime) -> bool:
    """Put aside while nothing can be put on record, which takes a moment; deleted when others can go on."""
    study, aside = spool / uid, spool / DELETED / uid
    try:
        if aside.exists():
            _recover(db, aside, study, before)
        marked = db.mark_images_deleted(uid, before, now, partial(_put_aside, study, aside, before))
        if marked:
            shutil.rmtree(aside)
    except OSError as error:
        raise Retryable(f"images of study {uid} cannot be deleted: {error.strerror}") from error
    return marked


def _recover(db: Database, aside: Path, study: Path, before: datetime) -> None:
    """Of one who was killed: all is put back, or of images marked as deleted what came meanwhile."""
    entry = db.entry(study.name)
    if entry is not None and entry.study.images_deleted_at is not None:
        _put_back(aside, study, before, {one.path for one in db.instances(study.name)})
    else:
        _put_back(aside, study, datetime.min.replace(tzinfo=UTC), set())
    shutil.rmtree(aside)


def _put_aside(study: Path, aside: Path, before: datetime, recorded: set[Path]) -> None:
    aside.mkdir(parents=True)
    for series in _folders(study):
        if series.name != RESULTS:
            series.rename(aside / series.name)
    _put_back(aside, study, before, recorded)


def _put_back(aside: Path, study: Path, before: datetime, recorded: set[Path]) -> None:
    """Whatever is neither on record nor old: an image that just comes."""
    for path in aside.rglob("*"):
        own = study / path.relative_to(aside)
        if own in recorded or _touched(path) <= before or path.is_dir():
            continue
        own.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # it came once more
            os.link(path, own)
        for folder in (own.parent, study):
            files.sync_directory(folder)


class Quarantine:
    """Goes through the spool, a study a step, and puts aside what is no object of it.

    A whole object that is not on record, as a copy by hand would be, is put on record. Once it has gone
    through, only studies are looked at again in whose folders something changed.
    """

    def __init__(self, db: Database, config: Config) -> None:
        self._db, self._config, self._spool = db, config, config.storage.spool
        self._pass: Iterator[Path] | None = None
        self._since, self._began = datetime.min.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)

    def step(self, now: datetime) -> bool:
        """False when it is through; the next step begins anew."""
        with files.may_delete(self._spool) as may:
            if not may:
                return False
            if self._pass is None:
                self._began = now
                self._expire(now)
                self._put_aside(_old_files(self._spool, now), "no file belongs here", now)
                self._pass = iter(sorted(one for one in _folders(self._spool) if STUDY.fullmatch(one.name)))
            study = next(self._pass, None)
            if study is None:
                self._pass, self._since = None, self._began - SETTLED
                return False
            if self._has_changed(study):
                self._look_through(study, now)
        return True

    def _has_changed(self, study: Path) -> bool:
        return any(_touched(one) >= self._since for one in (study, *_folders(study)))

    def _look_through(self, study: Path, now: datetime) -> None:
        self._put_aside(_old_files(study, now), "no file belongs here", now)
        known = self._db.sop_instance_uids(study.name)
        for series in _folders(study):
            if series.name == RESULTS:
                self._put_aside(self._unnamed(study.name, series, now), "no answer names it", now)
                continue
            for path in _old_files(series, now):
                if why := self._fault(path, known, now):
                    self._put_aside(iter([path]), why, now)

    def _fault(self, path: Path, known: Container[str], now: datetime) -> str:
        """Why a file is no object of this place; "" where it is one, and on record."""
        if path.suffix != ".dcm":
            return "no file of this name belongs here"
        if path.stem in known:
            return ""
        try:
            found = header.read_instance(path)
        except Rejected as error:
            return str(error)
        place = self._spool / found.study_instance_uid / found.series_instance_uid
        if path != place / f"{found.sop_instance_uid}.dcm":
            return "it is another object than its name says"
        assemble.register(self._db, self._config, found, now)
        log.info("SOP instance %s lay in the spool and is on record now", found.sop_instance_uid)
        return ""

    def _unnamed(self, uid: str, results: Path, now: datetime) -> Iterator[Path]:
        """Folders that a judging left which was killed."""
        named = {path.parent for answer in self._db.results(uid) for path in answer.files.values()}
        lease = timedelta(seconds=self._config.analysis.lease_seconds)
        for folder in _folders(results):
            if folder not in named and _touched(folder) < now - SETTLED - lease:
                yield folder

    def _put_aside(self, paths: Iterator[Path], why: str, now: datetime) -> None:
        for path in paths:
            relative = path.relative_to(self._spool)
            aside = self._spool / QUARANTINE / f"{now:%Y%m%dT%H%M%S}" / relative
            files.make_folder(aside.parent)
            os.replace(path, aside)
            log.warning("%s of the spool was put into its %s: %s", relative, QUARANTINE, why)

    def _expire(self, now: datetime) -> None:
        """A day's strays are deleted together, by the time in their folder's name."""
        oldest = now - timedelta(days=self._config.retention.quarantine_days)
        for folder in _folders(self._spool / QUARANTINE):
            if folder.name < f"{oldest:%Y%m%dT%H%M%S}":
                shutil.rmtree(folder)
                log.info("quarantine of %s was deleted", folder.name)


def _folders(folder: Path) -> list[Path]:
    """Those in it; none where it is gone. Links are no folders of ours."""
    try:
        return [Path(one.path) for one in os.scandir(folder) if one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Retryable(f"cannot read {folder.name} in the spool: {error.strerror}") from error


def _old_files(folder: Path, now: datetime) -> Iterator[Path]:
    """Files in it, not in folders of it, that nobody is writing any more."""
    for one in list(os.scandir(folder)):
        if not one.is_dir(follow_symlinks=False) and not one.name.startswith("."):
            path = Path(one.path)
            if _touched(path) < now - SETTLED:
                yield path


def _touched(path: Path) -> datetime:
    return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
