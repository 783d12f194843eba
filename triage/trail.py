"""The audit trail's way out of the database, to a file and to a collector, and the proof that it is whole.

Whoever can write to the database could write the whole chain anew: what the file and the collector have,
best on another machine, is what it is then compared with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from getpass import getuser
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from triage.audit import Actor, Event, messages
from triage.config import Audit
from triage.db import Database
from triage.db.audit import AT_ONCE, rows_from
from triage.domain import AuditRecord
from triage.errors import Retryable
from triage.outgoing import syslog

Sink = Callable[[Sequence[AuditRecord]], None]
TIMEOUT_SECONDS = 30.0
FILE = "file"
"""What the file is called among the sinks."""


def sinks(settings: Audit) -> dict[str, Sink]:
    """Where the trail goes, by name."""
    found: dict[str, Sink] = {}
    if (path := settings.file) is not None:
        found[FILE] = lambda records: _write(path, records)
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
    """A line a record. A line that was cut off, as by a lost power, stays: its record is written again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+") as file:
            lines = ("\n" if _is_cut_off(file) else "") + "".join(map(_line, records))
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Retryable(f"audit.file: {path}: {error.strerror}") from error


def _is_cut_off(file: BinaryIO) -> bool:
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read() != b"\n"


def _line(record: AuditRecord) -> str:
    """Number, hash, message."""
    return f"{record.number} {record.hash} {record.message}\n"


def _differences(db: Database, path: Path) -> Iterator[str]:
    """Where the file, of which older lines may have been put away, tells another story than the database.

    Who was killed while writing writes the same rows again: lines that are there twice are no fault.
    """
    last, sent = 0, db.trail.sent(FILE)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = enumerate(file, 1)
        while piece := [(place, _number(line), line) for place, line in islice(lines, AT_ONCE)]:
            rows = db.trail.rows([number for _, number, _ in piece])
            for place, number, line in piece:
                right = _line(rows[number]) if number in rows else ""
                if right and line != right and right.startswith(line.rstrip("\n")):
                    continue  # cut off: it has to follow whole
                if not number:
                    yield f"line {place} of {path} cannot be read"
                    continue
                if last and (gap := rows_from(last + 1, number - 1, f"removed from {path}")):
                    yield gap
                if not right:
                    yield f"row {number} stands in {path}, but not in the database"
                elif line != right:
                    yield f"row {number} stands in {path} in other words"
                last = max(last, number)
    if last and (gap := rows_from(last + 1, sent, f"removed from {path}")):
        yield gap


def _number(line: str) -> int:
    """Of the row that a line says it is; 0 for none."""
    found = re.match(r"[1-9]\d{0,17}(?!\d)", line, re.ASCII)
    return int(found[0]) if found else 0
