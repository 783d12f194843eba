"""The disk is full wherever something is written: refused or put off, kept, and well again by itself."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from pydicom import dcmread
from sqlalchemy.engine.default import DefaultDialect

from tests import peers
from tests.boxes import Boxes
from tests.faults.children import listening
from tests.faults.kills import PHANTOM, check_database, check_kept, opened
from tests.faults.table import Context, Row
from tests.objects import ct, save
from triage import analyze, assemble, config, daemon, trail
from triage.audit import Actor, Event, messages
from triage.config import Config
from triage.db import Database
from triage.dicom import phantom, sender
from triage.domain import StudyState
from triage.errors import Retryable

MEGABYTES = 24
PIXELS = {"Rows": 256, "Columns": 256, "PixelData": bytes(2 * 256 * 256)}


@dataclass
class Disk:
    """A small disk of its own where this machine lets us mount one, else a folder that pretends."""

    folder: Path
    mounted: bool

    @property
    def filler(self) -> Path:
        return self.folder / "filler"

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file, suppress(OSError):
            while self.mounted:
                file.write(bytes(1 << 16))
        if self.mounted:
            with self.filler.open("ab", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(512))

    def free(self) -> None:
        self.filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        with pretending(Disk(folder, mounted)) as disk:
            yield disk
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def pretending(disk: Disk) -> Iterator[Disk]:
    """In this process, where nothing can be mounted."""
    before = (os.fsync, DefaultDialect.do_commit)
    if not disk.mounted:
        pretend(disk.folder, disk.folder)
    try:
        yield disk
    finally:
        os.fsync, DefaultDialect.do_commit = before  # type: ignore[method-assign]


def pretend(full: Path, _home: Path) -> None:
    """From now on, while ``full`` has a filler, no file there can be flushed and no database committed."""
    fsync, commit = os.fsync, DefaultDialect.do_commit

    def flush(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if (full / "filler").exists() and full in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def do_commit(self: DefaultDialect, connection: sqlite3.Connection) -> None:
        if (full / "filler").exists() and (full / "triage.db").exists() and connection.in_transaction:
            connection.rollback()
            raise sqlite3.OperationalError("database or disk is full")
        commit(self, connection)  # type: ignore[arg-type]

    os.fsync = flush
    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign,assignment]


def full_at_each_write(context: Context) -> dict[str, Row]:
    places: dict[str, Callable[[Context, Disk, Row], None]] = {
        "the spool": partial(receive, where="storage"),
        "the database": partial(receive, where="database"),
        "the results": judge,
        "the audit file": audit,
    }
    rows = {}
    for name, fault in places.items():
        row = rows[name] = Row()
        with small_disk(context.folder / name.split()[1]) as disk:
            fault(context, disk, row)
            row.figure += "on a full tmpfs" if disk.mounted else "pretended: no tmpfs can be mounted here"
    return rows


def receive(context: Context, disk: Disk, row: Row, where: str) -> None:
    """Slices come until the disk is full, and go on coming; then there is room again."""
    at = {"storage": {"spool": str(disk.folder / "spool"), "minimum_free_gb": 0}}
    if where == "database":
        at = {"database": {"url": f"sqlite:///{disk.folder}/triage.db"}}
    home = context.folder / f"daemon_{where}"
    path = peers.write_config(home, listener=context.listener, **at)
    settings = config.load(path, {})
    with opened(settings) as db:
        db.migrate()
    files = [_slice(context.folder / f"sent_{where}", number) for number in range(12)]
    prepare = _as_it_is if disk.mounted else partial(pretend, disk.folder)
    with listening(path, context.folder / "log", None, prepare):
        known: dict[str, Path] = {}
        row.expect(not _send(settings, files[:4], known), "not taken while there was room")
        for _ in range(context.number(2, 10)):
            disk.fill()
            for one in files[4:]:
                left = _send(settings, [one], known)
                row.expect(bool(left) or not disk.mounted or where == "database", "taken without room")
                row.expect(all("0xA700" in said for said in left), f"said: {left}")
                row.tries += 1
            check_kept(settings, known, row)
            disk.free()
        with row.recovering():
            waiting = [one for one in files if one.name not in known]
            peers.wait_until(lambda: not _send(settings, waiting, known), seconds=20)
        check_kept(settings, known, row)
    row.keep(set(known) == {one.name for one in files}, "a slice that was sent until it was taken")
    check_database(settings, row)
    left = list((settings.storage.spool / "incoming").glob("*"))
    row.expect(not left, f"{len(left)} unfinished files are left")


def _as_it_is(_home: Path) -> None:
    pass


def _slice(folder: Path, number: int) -> Path:
    one = ct(number, **PIXELS)
    return save(one, folder / one.SOPInstanceUID)


def _send(settings: Config, files: list[Path], known: dict[str, Path]) -> list[str]:
    """Why what was not taken was not."""
    outcomes = sender.send(files, peers.destination(settings), calling_ae_title="SCANNER", timeout_seconds=40)
    known |= {one.path.name: one.path for one in outcomes if one.sent}
    return [one.error for one in outcomes if not one.sent]


def judge(context: Context, disk: Disk, row: Row) -> None:
    """The study is here, its results cannot be written: failed for now, never negative; then judged once."""
    home = context.folder / "judge"
    path = peers.write_config(home, storage={"spool": str(disk.folder / "spool"), "minimum_free_gb": 0})
    settings = config.load(path, {})
    with opened(settings) as db:
        db.migrate()
        take = daemon.pull.receiver(db, settings, lambda: datetime.now(UTC))
        files = phantom.write_study(home / "study", seed=1, **PHANTOM)
        daemon.pull.read_files(daemon.pull.find(files), db, take)
        uid = str(dcmread(files[0]).StudyInstanceUID)
        now = datetime.now(UTC) + timedelta(seconds=settings.assemble.quiet_seconds)
        assemble.step(db, settings, now)
        disk.fill()
        for _ in range(8):
            analyze.step(db, settings, Boxes(), "here", now)
            entry = db.entry(uid)
            assert entry is not None
            row.expect(entry.study.state is StudyState.FAILED, f"it is {entry.study.state}")
            row.expect("will be retried" in entry.priority.reason, entry.priority.reason)
            row.expect(not db.results(uid), "there is an answer")
            now += timedelta(hours=1)
            row.tries += 1
        disk.free()
        began = time.monotonic()
        analyze.step(db, settings, Boxes(), "here", now)
        row.recovered.append(time.monotonic() - began)
        row.expect([one.revision for one in db.results(uid)] == [1], "not one answer thereafter")
        here = {one.sop_instance_uid for one in db.instances(uid) if one.path.exists()}
        row.keep(len(here) == len(files), "slices of the study")
        check_database(settings, row)


def audit(context: Context, disk: Disk, row: Row) -> None:
    """The trail goes on in the database; the file gets every line once there is room."""
    home, file = context.folder / "audit_home", disk.folder / "audit.log"
    path = peers.write_config(home, audit={"file": str(file)})
    settings = config.load(path, {})
    with opened(settings) as db:
        db.migrate()
        sink = trail.sinks(settings.audit)[trail.FILE]
        _happen(db, 5)
        trail.step(db, trail.FILE, sink)
        disk.fill()
        for _ in range(5):
            _happen(db, 20)
            with suppress(Retryable):
                trail.step(db, trail.FILE, sink)
                row.expect(False, "written without room")
            row.tries += 1
        disk.free()
        with row.recovering():
            while trail.step(db, trail.FILE, sink):
                pass
        numbers = {line.split(" ")[0] for line in file.read_text().splitlines() if line}
        row.keep(len(numbers & {str(number) for number in range(1, 106)}) == 105, "lines of the trail")
        faults = list(trail.faults(db, settings.audit))
        row.expect(not faults, f"the trail: {faults[:2]}")


def _happen(db: Database, count: int) -> None:
    for _ in range(count):
        db.trail.append(messages(Event.STARTED, Actor("somebody", process="faults"), datetime.now(UTC)))
