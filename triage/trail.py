"""The audit trail's way out of the database, to a file and to a collector, and the proof that it is whole.

Whoever can write to the database could write the whole chain anew: what the file and the collector have,
best on another machine, is what it is then compared with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from getpass import getuser
from pathlib import Path

from triage.audit import Actor, Event, messages
from triage.config import Audit
from triage.db import Database
from triage.domain import AuditRecord
from triage.errors import Retryable
from triage.outgoing import syslog

Sink = Callable[[Sequence[AuditRecord]], None]
TIMEOUT_SECONDS = 30.0


def sinks(settings: Audit) -> dict[str, Sink]:
    """Where the trail goes, by name."""
    found: dict[str, Sink] = {}
    if (path := settings.file) is not None:
        found["file"] = lambda records: _write(path, records)
    if (collector := settings.syslog) is not None:
        found["syslog"] = lambda records: syslog.send(
            [record.message for record in records], collector, TIMEOUT_SECONDS
        )
    return found


def step(db: Database, name: str, sink: Sink) -> bool:
    """Hand on what this sink has not got; what was interrupted is handed on again."""
    records = db.trail.owed(name)
    if records:
        sink(records)
        db.trail.mark_sent(name, records[-1].number)
    return bool(records)


def faults(db: Database, settings: Audit) -> Iterator[str]:
    """A sentence for each place where rows were changed, removed or inserted."""
    yield from db.trail.faults()
    if settings.file is not None and settings.file.exists():
        yield from _differences(db, settings.file)


@contextmanager
def lifetime(db: Database, role: str, clock: Callable[[], datetime]) -> Iterator[None]:
    """Record that a role starts, and that it stops; a start without a stop before it was a crash."""
    actor = Actor(getuser(), process=f"triage/{role}")
    db.trail.append(messages(Event.STARTED, actor, clock()))
    try:
        yield
    finally:
        db.trail.append(messages(Event.STOPPED, actor, clock()))


def _write(path: Path, records: Sequence[AuditRecord]) -> None:
    """A line a record: number, hash, message."""
    lines = "".join(f"{one.number} {one.hash} {one.message}\n" for one in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Retryable(f"audit.file: {path}: {error.strerror}") from error


def _differences(db: Database, path: Path) -> Iterator[str]:
    """Where the file, of which older lines may have been put away, tells another story than the database."""
    records = db.trail.records()
    here = next(records, None)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            number, hash_, _ = line.split(" ", 2)
            while here is not None and here.number < int(number):
                here = next(records, None)
            if here is None or here.number != int(number):
                yield f"row {number} stands in {path}, but not in the database"
            elif here.hash != hash_:
                yield f"row {number} stands in {path} with another hash"
