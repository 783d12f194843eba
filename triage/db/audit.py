"""The audit trail: rows that are only ever added, each chained to the one before it by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager

from sqlalchemy import Connection, insert, select, text
from sqlalchemy.dialects.sqlite import insert as upsert

from triage.db.tables import audit, audit_sent
from triage.domain import AuditRecord

Transaction = Callable[[], AbstractContextManager[Connection]]
LAST_GIVEN = text("SELECT seq FROM sqlite_sequence WHERE name = 'audit'")
AT_ONCE = 1000
"""Rows read in one transaction."""


class Trail:
    """Adds to the trail, hands it on, and finds where it was tampered with."""

    def __init__(self, read: Transaction, write: Transaction) -> None:
        self._read, self._write = read, write

    def append(self, messages: Sequence[str]) -> None:
        """Add these messages, all or none."""
        with self._write() as connection:
            append(connection, messages)

    def owed(self, sink: str, limit: int = AT_ONCE) -> list[AuditRecord]:
        """What ``sink`` has not got yet, oldest first."""
        with self._read() as connection:
            return _after(connection, _sent(connection, sink), limit)

    def sent(self, sink: str) -> int:
        """The last row that ``sink`` has; 0 for none."""
        with self._read() as connection:
            return _sent(connection, sink)

    def mark_sent(self, sink: str, number: int) -> None:
        """``sink`` has all rows up to this one."""
        sent = upsert(audit_sent).values(sink=sink, number=number)
        with self._write() as connection:
            connection.execute(sent.on_conflict_do_update(index_elements=["sink"], set_={"number": number}))

    def records(self) -> Iterator[AuditRecord]:
        """Every row, oldest first."""
        last: int | None = None
        while True:
            with self._read() as connection:
                found = _after(connection, last, AT_ONCE)
            yield from found
            if len(found) < AT_ONCE:
                return
            last = found[-1].number

    def rows(self, numbers: Collection[int]) -> dict[int, AuditRecord]:
        """Those of these numbers that there are."""
        query = select(audit).where(audit.c.number.in_(numbers))
        with self._read() as connection:
            found = [AuditRecord(**row) for row in connection.execute(query).mappings()]
        return {record.number: record for record in found}

    def faults(self) -> Iterator[str]:
        """A sentence for each place where rows were changed, removed or inserted."""
        with self._read() as connection:
            given: int = connection.execute(LAST_GIVEN).scalar() or 0
        before, number = "", 0
        for record in self.records():
            if record.number != number + 1:
                gap = rows_from(number + 1, record.number - 1, "removed")
                yield gap or f"row {record.number} was inserted"
            elif record.hash != chained(before, record.number, record.message):
                yield f"row {record.number} was changed, or what stands before it"
            before, number = record.hash, record.number
        if number < given:
            yield rows_from(number + 1, given, "removed")


def append(connection: Connection, messages: Sequence[str]) -> None:
    """Add these messages in the transaction of what they tell of.

    No number is given twice: where the last rows were removed, the gap stays.
    """
    query = select(audit.c.number, audit.c.hash).order_by(audit.c.number.desc()).limit(1)
    last = connection.execute(query).first()
    number, before = (last.number, last.hash) if last else (0, "")
    number = max(number, connection.execute(LAST_GIVEN).scalar() or 0)
    rows = []
    for message in messages:
        number += 1
        before = chained(before, number, message)
        rows.append({"number": number, "message": message, "hash": before})
    if rows:
        connection.execute(insert(audit), rows)


def chained(before: str, number: int, message: str) -> str:
    """The hash of a row, in hex: SHA-256 of the hash before it, its number and its message."""
    return hashlib.sha256(f"{before}\n{number}\n{message}".encode()).hexdigest()


def _sent(connection: Connection, sink: str) -> int:
    query = select(audit_sent.c.number).where(audit_sent.c.sink == sink)
    return connection.execute(query).scalar() or 0


def _after(connection: Connection, last: int | None, limit: int) -> list[AuditRecord]:
    query = select(audit).order_by(audit.c.number).limit(limit)
    if last is not None:
        query = query.where(audit.c.number > last)
    return [AuditRecord(**row) for row in connection.execute(query).mappings()]


def rows_from(first: int, last: int, what: str) -> str:
    """That these rows were removed, or whatever they were; "" for none."""
    if last < first:
        return ""
    return f"row {first} was {what}" if first == last else f"rows {first} to {last} were {what}"
